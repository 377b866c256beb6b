"""SCL as it is written today, with torch.nn.utils.parametrize, against the optimizer of sclcore.

    python -m benchmarks.reparametrised [--device cpu|cuda] [--quick]

Theirs: every weight becomes a module that holds w and m and hands out w · H(m); autograd finds both
gradients, those of m are normalised after the backward pass, and torch's SGD steps both. Ours: the
plain model and `SCL`. Both run in the same plain loop of forward, backward and update. Before
anything is timed, both train a small network in float64 and must come to the same masks and
weights, else the benchmark fails.

Time: one rank, steps of the two in turn, medians and the median of the ratios. Peak memory: that of
a few steps, each form in a process of its own. Bytes: those that a rank hands to the collectives in
one step under DDP on two ranks, counted over gloo on the CPU, whatever the device. The last line is
a JSON object; its ratio is the step time of theirs ÷ ours, of the first model at the largest batch.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.optim import SGD

from benchmarks.common import in_turn, median, median_ratio, options_parser, parse, report, table
from benchmarks.communication import STEPS, counted
from benchmarks.training import (
    LR,
    WARM_UP,
    Load,
    PeakMemory,
    add_threads,
    engine_config,
    on_ranks,
    warm_up,
)
from launcher.recipe.engine import EngineConfig
from sclcore import SCL, connection_groups

MODELS = ("resnet50", "vit_small_patch16_224")
BATCHES = {"cpu": (8, 32), "cuda": (64, 256)}
ROUNDS = {"cpu": 10, "cuda": 50}
TARGET, RANKS = 1.0, 2
MOMENTUM, DECAY = 0.9, 1e-4

Wrap = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Settings:
    """What both forms train with."""

    lr: float = LR
    lam: float = 0.1
    mask_lr: float = 1e-3


class UnitStep(torch.autograd.Function):
    """H(m), with 1 for its derivative."""

    @staticmethod
    def forward(ctx: Any, mask: Tensor) -> Tensor:
        return (mask > 0).to(mask.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class Masked(nn.Module):
    """w → w · H(m)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.ones_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        live: Any = UnitStep.apply(self.mask)
        return weight * live


class Theirs:
    """w and m are parameters of the model, which computes w · H(m) in every forward pass."""

    def __init__(self, model: nn.Module, settings: Settings, wrap: Wrap) -> None:
        for layer in [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]:
            parametrize.register_parametrization(layer, "weight", Masked(layer.weight.detach()))
        self._plain = model
        self._mask_variables = [
            layer.parametrizations.weight[0].mask for _, layer in self._layers()
        ]
        learned = {id(mask) for mask in self._mask_variables}
        rest = [p for p in model.parameters() if id(p) not in learned]
        masks = {"params": self._mask_variables, "lr": settings.mask_lr, "weight_decay": 0.0}
        self._optimizer = SGD(
            [
                {"params": [p for p in rest if p.ndim > 1]},
                {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
                masks,
            ],
            lr=settings.lr,
            momentum=MOMENTUM,
            weight_decay=DECAY,
        )
        self._lam = settings.lam
        self._model = wrap(model)

    def step(self, inputs: Tensor, labels: Tensor) -> None:
        self._optimizer.zero_grad()
        cross_entropy(self._model(inputs), labels).backward()
        for mask in self._mask_variables:
            grad: Any = mask.grad
            rms = grad.square().mean(dim=tuple(range(1, grad.ndim)), keepdim=True).sqrt()
            grad.div_(rms.add_(1e-12)).add_(self._lam)
        self._optimizer.step()

    def masks(self) -> dict[str, Tensor]:
        return {
            f"{name}.weight": layer.parametrizations.weight[0].mask > 0
            for name, layer in self._layers()
        }

    def weights(self) -> dict[str, Tensor]:
        """The effective weights."""
        return {f"{name}.weight": layer.weight for name, layer in self._layers()}

    def _layers(self) -> Iterator[tuple[str, Any]]:
        for name, module in self._plain.named_modules():
            if parametrize.is_parametrized(module, "weight"):
                yield name, module


class Ours:
    """The model is plain; w and m are state of the optimizer."""

    def __init__(self, model: nn.Module, settings: Settings, wrap: Wrap) -> None:
        self._plain = model
        self._optimizer = SCL(
            connection_groups(model),
            lr=settings.lr,
            lam=settings.lam,
            mask_lr=settings.mask_lr,
            momentum=MOMENTUM,
            mask_momentum=MOMENTUM,
            weight_decay=DECAY,
            # The form that is compared has the paper's divisor, and no restarts.
            normalize="feature",
            mask_restart=0.0,
        )
        self._model = wrap(model)

    def step(self, inputs: Tensor, labels: Tensor) -> None:
        self._optimizer.zero_grad()
        cross_entropy(self._model(inputs), labels).backward()
        self._optimizer.step()

    def masks(self) -> dict[str, Tensor]:
        return self._optimizer.masks()

    def weights(self) -> dict[str, Tensor]:
        """The effective weights."""
        parameters = dict(self._plain.named_parameters())
        return {name: parameters[name] for name in self.masks()}


FORMS: dict[str, type[Theirs] | type[Ours]] = {"theirs": Theirs, "ours": Ours}


def plain(model: nn.Module) -> nn.Module:
    return model


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 5),
    ).double()


def check_same_training(ours: Settings, theirs: Settings, steps: int = 30) -> None:
    """RuntimeError unless both forms, from the same weights, come to the same network.

    In float64 they differ by rounding alone, many orders below what a mask variable moves in a
    step. Some connections must have died, or nothing was compared.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(16, 2, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (16,), generator=generator)
    network = small_network()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    forms = []
    for form, settings in ((Ours, ours), (Theirs, theirs)):
        network = small_network()
        network.load_state_dict(state)
        forms.append(form(network, settings, plain))
        for _ in range(steps):
            forms[-1].step(images, labels)
    masks = [form.masks() for form in forms]
    weights = [form.weights() for form in forms]
    live = torch.cat([mask.flatten() for mask in masks[0].values()])
    if live.all() or not live.any():
        raise RuntimeError(
            "all connections of the small network share one fate: nothing to compare"
        )
    for name, mask in masks[0].items():
        differing = int((mask != masks[1][name]).sum())
        far = float((weights[0][name] - weights[1][name]).detach().abs().max())
        if differing or far > 1e-9:
            raise RuntimeError(
                f"the two forms do not train the same network: after {steps} steps {differing} "
                f"masks of {name} differ and its weights by up to {far:.1e}"
            )


def training_step(
    form: str, load: Load, device: torch.device, wrap: Wrap = plain
) -> Callable[[], None]:
    torch.manual_seed(0)
    trained = FORMS[form](load.network().to(device), Settings(), wrap)
    images, labels = load.samples(device)
    return lambda: trained.step(images, labels)


def peak_memory(device: torch.device, config: EngineConfig, form: str, load: Load) -> int:
    """Bytes at the peak of a few steps; for a process of its own."""
    peak = PeakMemory(device)
    step = training_step(form, load, device)
    for _ in range(WARM_UP):
        step()
    return peak.read()


def step_bytes(
    device: torch.device, config: EngineConfig, loads: list[Load]
) -> dict[str, dict[str, int]]:
    """Model → form → bytes per step of this rank. Collective."""
    found: dict[str, dict[str, int]] = {}
    for load in loads:
        found[load.model] = {}
        for form in FORMS:
            step = training_step(form, load, device, DistributedDataParallel)
            warm_up({form: step})
            found[load.model][form] = counted(step).bytes.total() // STEPS
    return found


def step_times(load: Load, device: torch.device, rounds: int) -> dict[str, float]:
    steps = {form: training_step(form, load, device) for form in FORMS}
    warm_up(steps)
    timed = in_turn(steps, device, rounds)
    del steps
    gc.collect()
    return {
        "theirs_ms": 1e3 * median(timed, "theirs"),
        "ours_ms": 1e3 * median(timed, "ours"),
        "time_ratio": median_ratio(timed, "theirs", "ours"),
    }


def row(result: dict[str, Any]) -> list[str]:
    return [
        f"{result['model']}, batch {result['batch']}",
        f"{result['theirs_ms']:.1f} ms",
        f"{result['ours_ms']:.1f} ms",
        f"{result['time_ratio']:.3f}",
        f"{result['theirs_mb']:.0f} MB",
        f"{result['ours_mb']:.0f} MB",
        f"{result['theirs_mb'] - result['ours_mb']:.0f} MB",
        f"{result['bytes_ratio']:.3f}",
    ]


def main() -> None:
    parser = options_parser(__doc__)
    add_threads(parser)
    parser.add_argument("--rounds", type=int, help="steps of each (default: cpu 10, cuda 50)")
    options = parse(parser)
    config = engine_config(options)
    device = torch.device(options.device)
    rounds = options.rounds or (3 if options.quick else ROUNDS[options.device])
    torch.set_num_threads(options.threads)
    tried = Settings(lr=0.05, lam=0.3, mask_lr=0.02)
    check_same_training(tried, tried)
    if options.quick:
        loads = [Load("mobilenetv2_100", batch=4, image_size=64)]
    else:
        loads = [Load(model, batch, 224) for model in MODELS for batch in BATCHES[options.device]]
    small = list({load.model: Load(load.model, 2, load.image_size) for load in loads}.values())
    # Ranks with more threads than cores wait for each other, and nothing is timed here.
    frugal = config.model_copy(update={"threads": 1})
    sent = on_ranks(step_bytes, RANKS, frugal, small, device="cpu")[0]
    results: list[dict[str, Any]] = []
    for load in loads:
        memory = {
            f"{form}_mb": on_ranks(peak_memory, 1, config, form, load)[0] / 1e6 for form in FORMS
        }
        theirs, ours = sent[load.model]["theirs"], sent[load.model]["ours"]
        results.append(
            {
                "model": load.model,
                "batch": load.batch,
                "image_size": load.image_size,
                **step_times(load, device, rounds),
                **memory,
                "theirs_bytes": theirs,
                "ours_bytes": ours,
                "bytes_ratio": theirs / ours,
            }
        )
    print(f"training step, fp32, {rounds} rounds; bytes on {RANKS} ranks")
    header = ["", "theirs", "ours", "ratio", "their peak", "our peak", "saved", "bytes, ratio"]
    print(table(header, [row(result) for result in results]))
    headline = [r for r in results if r["model"] == loads[0].model][-1]
    report(
        "reparametrised",
        ratio=headline["time_ratio"],
        target=TARGET,
        device=device,
        details={"rounds": rounds, "steps": results},
    )


if __name__ == "__main__":
    main()
