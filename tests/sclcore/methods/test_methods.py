"""Methods against independent programs of the papers' own statements."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sclcore import SCL, Schedule, Scheduler, connection_groups
from sclcore.choice import largest
from sclcore.courses import cubic_density
from sclcore.driver.budgets import erk_densities
from sclcore.driver.build import optimizer_of
from sclcore.driver.method import DrivenMethod
from sclcore.driver.optimizer import Driver
from sclcore.methods.magnitude import Magnitude
from sclcore.methods.rigl import RigL
from sclcore.methods.soft_threshold import SoftThreshold
from tests.sclcore.nets import Mixed, Mlp, mixed_batches, mlp, mlp_batches, mse_step

STEPS = 30
SGD: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-2}
SCHEDULE = Schedule(lr_warmup=0.1)
Make = Callable[..., Driver]


def driver(kind: type[DrivenMethod], model: nn.Module, **options: Any) -> Driver:
    """The optimizer of a method; `options` are the method's own and those of the weights."""
    own = {key: options.pop(key) for key in [*options] if key in kind.model_fields}
    settings: dict[str, Any] = {"lr": 0.05} | SGD | options
    return Driver(kind(**own), connection_groups(model), **settings)


def magnitude(model: nn.Module, **options: Any) -> Driver:
    options = {"density": 0.2, "begin": 0.2, "end": 0.7, "every": 4} | options
    return driver(Magnitude, model, **options)


def rigl(model: nn.Module, **options: Any) -> Driver:
    options = {"density": 0.3, "drop_fraction": 0.5, "end": 0.8, "every": 5} | options
    return driver(RigL, model, **options)


def soft(model: nn.Module, **options: Any) -> Driver:
    return driver(SoftThreshold, model, **{"s_init": -5.0, "s_weight_decay": 0.2} | options)


MAKERS = [magnitude, rigl, soft]


def train(
    model: nn.Module,
    optimizer: Driver,
    batches: list[tuple[Tensor, Tensor]],
    steps: range = range(STEPS),
    each: Callable[[int], None] = lambda step: None,
) -> None:
    scheduler = Scheduler(optimizer, SCHEDULE)
    for step in steps:
        scheduler.set_progress(step / STEPS)
        mse_step(model, optimizer, batches[step])
        each(step)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_same(model: nn.Module, other: nn.Module, tolerance: float = 1e-12) -> None:
    """To rounding in double: both add up the same numbers, in another order here and there."""
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=tolerance), name


class Textbook:
    """SGD with momentum and decay on a dict of tensors, one weight update at a time."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.momenta = {n: torch.zeros_like(p) for n, p in model.named_parameters()}

    def gradients(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        self.model.zero_grad()
        nn.functional.mse_loss(self.model(batch[0]), batch[1]).backward()
        found = {}
        for name, p in self.model.named_parameters():
            assert p.grad is not None
            found[name] = p.grad.clone()
        return found

    @torch.no_grad()
    def sgd(self, name: str, grad: Tensor, lr: float) -> None:
        p = dict(self.model.named_parameters())[name]
        decay = SGD["weight_decay"] if p.ndim > 1 else 0.0
        self.momenta[name] = SGD["momentum"] * self.momenta[name] + grad + decay * p
        p -= lr * self.momenta[name]


def test_magnitude_is_the_textbooks() -> None:
    """A loop over all weights in one sorted list."""
    model = mlp(dtype=torch.float64)
    book = Textbook(copy.deepcopy(model))
    optimizer, batches = magnitude(model), mlp_batches(STEPS, dtype=torch.float64)
    names, live, densities = ["0.weight", "2.weight"], {}, set()
    for name in names:
        live[name] = torch.ones_like(dict(model.named_parameters())[name])
    for step in range(STEPS):
        progress, lr = step / STEPS, 0.05 * SCHEDULE.lr_factor(step / STEPS)
        grads = book.gradients(batches[step])
        for name, grad in grads.items():
            book.sgd(name, grad * live.get(name, 1.0), lr)
        if progress >= 0.2 and (step % 4 == 0 or progress >= 0.7):
            t = min(1.0, (progress - 0.2) / 0.5)
            sparsity = 0.8 + (0.0 - 0.8) * (1 - t) ** 3
            parameters = dict(book.model.named_parameters())
            everything = torch.cat([parameters[n].detach().abs().flatten() for n in names])
            bound = everything.sort(descending=True).values[round((1 - sparsity) * 192) - 1]
            for name in names:
                live[name] *= (parameters[name].detach().abs() >= bound).double()
                parameters[name].data *= live[name]
                book.momenta[name] *= live[name]
            densities.add(round(1 - sparsity, 6))

    train(model, optimizer, batches)
    assert len(densities) > 3
    assert_same(model, book.model)
    masks = optimizer.masks()
    assert all(torch.equal(masks[name], live[name].bool()) for name in names)
    assert sum(optimizer.live_connections().values()) == round(0.2 * 192)


def test_magnitude_keeps_the_largest_of_each_block() -> None:
    """N:M: of every four neighbours those that a search over all pairs finds; one at a time."""
    model = mlp()
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim > 1}
    optimizer = magnitude(model, density=None, n_m="2:4", lr=0.0)
    most: list[int] = []
    train(
        model,
        optimizer,
        mlp_batches(STEPS),
        each=lambda step: most.append(
            max(int(mask.view(-1, 4).sum(1).max()) for mask in optimizer.masks().values())
        ),
    )
    assert most == sorted(most, reverse=True)
    assert set(most) == {4, 3, 2}
    for name, mask in optimizer.masks().items():
        for row, kept in zip(weights[name].view(-1, 4), mask.view(-1, 4), strict=True):
            best = max(itertools.combinations(range(4), 2), key=lambda p: row[[*p]].abs().sum())
            assert kept.nonzero().flatten().tolist() == [*best]


def test_what_n_m_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="needs density or n_m, one of them"):
        Magnitude(density=0.5, n_m="2:4")
    with pytest.raises(ValueError, match="takes n_m or budget: erk"):
        Magnitude(n_m="2:4", budget="erk")
    network = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"0\.weight has 6 input connections .* exclude it"):
        optimizer_of(Magnitude(n_m="2:4"), network, torch.zeros(1, 6), {"lr": 0.1})
    optimizer_of(Magnitude(n_m="2:4", exclude=["0"]), network, torch.zeros(1, 6), {"lr": 0.1})


@pytest.mark.parametrize("budget", ["layer", "erk"])
def test_magnitude_keeps_the_largest_of_each_layer(budget: str) -> None:
    """Where layers share the density out beforehand, each loses its own smallest."""
    model = Mixed()
    optimizer = magnitude(model, budget=budget, density=0.25)
    shapes = [p.shape for n, p in model.named_parameters() if n in optimizer.connection_names]
    sizes = list(optimizer.connection_sizes().values())
    seen: list[dict[str, Tensor]] = []
    train(
        model,
        optimizer,
        mixed_batches(torch.float32, STEPS),
        each=lambda step: seen.append(optimizer.masks()),
    )
    live = list(optimizer.live_connections().values())
    assert sum(live) == round(0.25 * sum(sizes))
    if budget == "layer":
        assert all(abs(n - 0.25 * size) < 1 for n, size in zip(live, sizes, strict=True))
    else:
        wanted = erk_densities(shapes, 0.25)
        assert all(abs(n - d * s) < 1 for n, d, s in zip(live, wanted, sizes, strict=True))
    for before, after in itertools.pairwise(seen):
        assert not any((after[name] & ~mask).any() for name, mask in before.items())


def test_rigl_is_algorithm_1() -> None:
    """With Python lists and sorting in place of tensors, from the masks that RigL drew."""
    model = mlp(dtype=torch.float64)
    optimizer, batches = rigl(model), mlp_batches(STEPS, dtype=torch.float64)
    book = Textbook(copy.deepcopy(model))
    live = {name: mask.flatten().tolist() for name, mask in optimizer.masks().items()}
    exchanged = 0
    for step in range(STEPS):
        progress, lr = step / STEPS, 0.05 * SCHEDULE.lr_factor(step / STEPS)
        grads = book.gradients(batches[step])
        if step and step % 5 == 0 and progress < 0.8:
            share = 0.5 / 2 * (1 + math.cos(progress * math.pi / 0.8))
            for name, p in book.model.named_parameters():
                if name not in live:
                    continue
                w, g, before = p.data.view(-1), grads[name].flatten(), live[name]
                active = [i for i, on in enumerate(before) if on]
                drop = int(share * len(active))
                active.sort(key=lambda i, w=w: -abs(float(w[i])))
                kept = set(active[: len(active) - drop])
                others = [i for i in range(len(before)) if i not in kept]
                others.sort(key=lambda i, g=g: -abs(float(g[i])))
                after = kept | set(others[:drop])
                live[name] = [i in after for i in range(len(before))]
                momentum = book.momenta[name].view(-1)
                for i in range(len(before)):
                    exchanged += live[name][i] and not before[i]
                    if not live[name][i]:
                        w[i] = momentum[i] = 0.0
            continue
        for name, grad in grads.items():
            mask = torch.tensor(live[name]).view_as(grad) if name in live else torch.ones(())
            book.sgd(name, grad * mask, lr)

    train(model, optimizer, batches)
    assert exchanged > 10
    assert_same(model, book.model)
    masks = optimizer.masks()
    assert all(masks[name].flatten().tolist() == live[name] for name in live)


class SoftLinear(nn.Module):
    """STR as its paper writes it, differentiated by autograd."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        v = linear.weight.detach()
        self.s = nn.Parameter(torch.tensor(-5.0, dtype=v.dtype))
        self.w = nn.Parameter(v + v.sign() * self.s.detach().sigmoid())
        self.b = nn.Parameter(linear.bias.detach().clone())

    def effective(self) -> Tensor:
        return self.w.sign() * torch.relu(self.w.abs() - torch.sigmoid(self.s))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.effective(), self.b)


@pytest.mark.parametrize("nesterov", [False, True])
def test_str_is_autograd_of_its_formula(nesterov: bool) -> None:
    model = mlp(dtype=torch.float64)
    layers = SoftLinear(model.first), SoftLinear(model.second)
    book = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    optimizer, batches = (
        soft(model, nesterov=nesterov),
        mlp_batches(STEPS, dtype=torch.float64),
    )
    theirs = torch.optim.SGD(
        [
            {"params": [layer.w for layer in layers], "weight_decay": 1e-2},
            {"params": [layer.s for layer in layers], "weight_decay": 0.2},
            {"params": [layer.b for layer in layers], "weight_decay": 0.0},
        ],
        lr=0.05,
        momentum=0.9,
        nesterov=nesterov,
    )
    scheduler = Scheduler(theirs, SCHEDULE)
    for step in range(STEPS):
        scheduler.set_progress(step / STEPS)
        mse_step(book, theirs, batches[step])

    train(model, optimizer, batches)
    for mine, layer in zip((model.first, model.second), layers, strict=True):
        # The threshold is kept in float32.
        assert torch.allclose(mine.weight, layer.effective(), rtol=0, atol=1e-6)
        assert torch.equal(mine.weight != 0, layer.effective() != 0)
    for g, layer in zip(optimizer.metrics().values(), layers, strict=True):
        assert g == pytest.approx(float(layer.s.detach().sigmoid()), abs=1e-6)
    live = optimizer.live_connections()
    assert 0 < sum(live.values()) < 0.9 * 192
    assert optimizer.masks().keys() == live.keys() == optimizer.connection_sizes().keys()


def test_str_starts_from_the_models_own_weights() -> None:
    model = mlp()
    before = weights_of(model)
    optimizer = soft(model, s_init=-4.0)
    assert sum(optimizer.live_connections().values()) == 192
    for name, weight in weights_of(model).items():
        # w = v + g rounds at the size of the larger one, g = 0.018.
        assert torch.allclose(weight, before[name], rtol=0, atol=1e-7)


def test_a_flat_schedule_is_dense_sgd() -> None:
    """Density 1 leaves torch's SGD, bit for bit."""
    models = [mlp(), mlp()]
    batches = mlp_batches(STEPS)
    train(models[0], magnitude(models[0], density=1.0, nesterov=True), batches)
    groups = [
        {"params": [p for p in models[1].parameters() if p.ndim > 1]},
        {"params": [p for p in models[1].parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    sgd = torch.optim.SGD(groups, lr=0.05, nesterov=True, momentum=0.9, weight_decay=1e-2)
    scheduler = Scheduler(sgd, SCHEDULE)
    for step in range(STEPS):
        scheduler.set_progress(step / STEPS)
        mse_step(models[1], sgd, batches[step])
    assert_same(*models, tolerance=0.0)


def test_the_cubic_schedule_has_the_papers_ends() -> None:
    times = [0.0, 0.2, 0.45, 0.7, 1.0]
    densities = [cubic_density(t, final=0.1, begin=0.2, end=0.7) for t in times]
    # Half-way, (1 − ½)³ of the sparsity is still to come: 0.1 + 0.9 / 8.
    assert densities == pytest.approx([1.0, 1.0, 0.2125, 0.1, 0.1])


def test_erk_against_its_formula() -> None:
    """ResNet-like shapes: 1×1 and small layers are clipped at 1, the others share one ε."""
    shapes = [(16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (64, 64, 1, 1), (10, 64)]
    sizes = [math.prod(s) for s in shapes]
    for density in (0.6, 0.3, 0.1, 0.02):
        found = erk_densities(shapes, density)
        assert sum(d * n for d, n in zip(found, sizes, strict=True)) == pytest.approx(
            density * sum(sizes)
        )
        raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
        scales = [d / r for d, r in zip(found, raw, strict=True) if d < 1]
        assert scales == pytest.approx([scales[0]] * len(scales))
        for d, r in zip(found, raw, strict=True):
            # A layer is dense only if its share would come out above 1.
            assert 0 < d < 1 or (d == 1 and scales[0] * r > 1)


def test_erk_of_two_layers_by_hand() -> None:
    """(4 + 6) / 24 and (2 + 2) / 4: the second would be 1.6 at half density, so it is dense."""
    assert erk_densities([(4, 6), (2, 2)], 0.5) == pytest.approx([10 / 24, 1.0])
    assert erk_densities([(4, 6), (2, 2)], 0.2) == pytest.approx(
        [5.6 / 14 * 10 / 24, 5.6 / 14 * 4 / 4]
    )


@pytest.mark.parametrize("density", [0.05, 0.111, 0.5, 1.0])
def test_rigl_has_its_density_from_the_beginning_to_the_end(density: float) -> None:
    model = Mixed()
    optimizer = rigl(model, density=density)
    total = sum(optimizer.connection_sizes().values())
    assert sum(
        int((p != 0).sum()) for n, p in model.named_parameters() if n in optimizer.masks()
    ) == (round(density * total))
    seen = []
    train(
        model,
        optimizer,
        mixed_batches(torch.float32, STEPS),
        each=lambda step: seen.append(optimizer.live_connections()),
    )
    assert {sum(live.values()) for live in seen} == {round(density * total)}
    assert seen.count(seen[0]) == STEPS


def test_magnitude_keeps_the_best_weight_of_a_layer_that_would_die() -> None:
    model = mlp()
    with torch.no_grad():
        model.second.weight.mul_(1e-3)
        model.second.weight[2, 5] = 2e-3
    optimizer = magnitude(model, density=0.1, begin=0.0, end=0.1, every=1, momentum=0.0)
    Scheduler(optimizer, SCHEDULE).set_progress(0.5)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    mse_step(model, optimizer, mlp_batches(1)[0])
    assert optimizer.held_layers == ["2.weight"]
    assert optimizer.live_connections() == {"0.weight": 18, "2.weight": 1}
    assert optimizer.masks()["2.weight"][2, 5]


def test_the_largest_with_ties_are_the_first_ones() -> None:
    scores = torch.tensor([1.0, 3.0, 1.0, 0.0, 1.0, 3.0])
    assert largest(scores, 4).tolist() == [True, True, True, False, False, True]
    assert largest(scores, 0).sum() == 0
    assert largest(scores, 9).all()


@pytest.mark.parametrize("made_by", MAKERS)
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_dead_connections_are_zero_and_what_is_saved_goes_on_bit_for_bit(
    made_by: Make, rule: str
) -> None:
    """Interrupted after 13 updates and loaded into a new model and optimizer."""
    batches = mixed_batches(torch.float32, STEPS)
    options = {"weight_rule": rule} | ({"momentum": 0.0} if rule == "adamw" else {})
    torch.manual_seed(0)
    whole = Mixed()
    optimizer = made_by(whole, **options)

    def dead_are_zero(step: int) -> None:
        parameters = dict(whole.named_parameters())
        for name, mask in optimizer.masks().items():
            assert not parameters[name][~mask].any(), (step, name)

    first, other = copy.deepcopy(whole), Mixed()
    train(whole, optimizer, batches, each=dead_are_zero)
    live = optimizer.live_connections().values()
    assert 0 < sum(live) < sum(optimizer.connection_sizes().values())

    interrupted = made_by(first, **options)
    train(first, interrupted, batches, range(13))
    resumed = made_by(other, **options)
    other.load_state_dict(first.state_dict())
    resumed.load_state_dict(copy.deepcopy(interrupted.state_dict()))
    train(other, resumed, batches, range(13, STEPS))
    assert_same(whole, other, tolerance=0.0)
    assert optimizer.mask_hash() == resumed.mask_hash()


@pytest.mark.parametrize("made_by", MAKERS)
def test_a_gradient_that_is_not_finite_changes_nothing(made_by: Make) -> None:
    model = mlp()
    optimizer, batches = made_by(model), mlp_batches(STEPS)
    train(model, optimizer, batches, range(7))
    before, masks = weights_of(model), optimizer.mask_hash()
    state = copy.deepcopy(optimizer.state_dict())
    inputs, targets = batches[8]
    mse_step(model, optimizer, (inputs * math.inf, targets))
    assert optimizer.skipped_steps == 1
    assert not math.isfinite(optimizer.grad_norm)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert optimizer.mask_hash() == masks
    for key, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state["state"][key][name]))
    mse_step(model, optimizer, batches[8])
    assert math.isfinite(optimizer.grad_norm)


@pytest.mark.parametrize("made_by", MAKERS)
def test_two_copies_with_the_same_gradients_have_the_same_masks(made_by: Make) -> None:
    """What ranks are: other seeds of the process, the same weights and averaged gradients."""
    model = mlp()
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    one = made_by(model)
    torch.manual_seed(2)
    two = made_by(other)
    batches = mlp_batches(STEPS)
    train(model, one, batches)
    train(other, two, batches)
    assert one.mask_hash() == two.mask_hash()
    assert_same(model, other, tolerance=0.0)


@pytest.mark.parametrize(
    ("made_by", "options", "words"),
    [
        (magnitude, {"density": 0.0}, "density\n.*greater than 0"),
        (magnitude, {"begin": 0.7}, "begin must lie below end"),
        (magnitude, {"every": 0}, "every\n.*greater than or equal to 1"),
        (rigl, {"density": 1.1}, "density\n.*less than or equal to 1"),
        (rigl, {"drop_fraction": 0.0}, "drop_fraction\n.*greater than 0"),
        (rigl, {"end": 1.5}, "end\n.*less than or equal to 1"),
        (soft, {"s_init": math.nan}, "s_init\n.*finite number"),
        (soft, {"s_weight_decay": -1.0}, "s_weight_decay\n.*greater than or equal to 0"),
        (soft, {"momentum": 1.0}, "momentum must be"),
    ],
)
def test_what_is_out_of_range_is_refused(
    made_by: Make, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        made_by(Mlp(), **options)


@pytest.mark.parametrize("kind", [Magnitude, RigL])
def test_coarser_connections_are_refused(kind: type[Magnitude] | type[RigL]) -> None:
    groups = connection_groups(Mixed(), granularity={"conv": "kernel"})
    with pytest.raises(ValueError, match="single weights only"):
        Driver(kind(density=0.5), groups, lr=0.1)
    with pytest.raises(ValueError, match="pass connection_groups"):
        Driver(kind(density=0.5), Mlp().parameters(), lr=0.1)


def test_all_methods_say_the_same_things() -> None:
    """What a loop asks of SCL it may ask of each method."""
    for made_by in (*MAKERS, lambda m: SCL(connection_groups(m), lr=0.1, lam=0.1)):
        model = mlp()
        optimizer = made_by(model)
        assert optimizer.connection_sizes() == {"0.weight": 128, "2.weight": 64}
        assert optimizer.connection_names == {"0.weight", "2.weight"}
        live = {name: int(mask.sum()) for name, mask in optimizer.masks().items()}
        assert optimizer.live_connections() == live
        assert len(optimizer.mask_hash()) == 64
