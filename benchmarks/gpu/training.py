"""SCL against dense training and against timm's own loop, on one card with synthetic data."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.optim._optim_factory import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from benchmarks.common import in_turn, median, median_ratio
from benchmarks.gpu.parts import Measuring
from sclcore import SCL, connection_groups

MODELS = ("resnet50", "mobilenetv2_100", "vit_small_patch16_224")
BATCH, SIZE = 256, 224
# A rate at which noise as data never ends in a NaN, which SCL would skip.
LR = 1e-3
WARM_UP, ROUNDS = 3, 12


@dataclass(frozen=True)
class Case:
    """A network, its batch and how its tensors lie in memory."""

    model: str
    batch: int
    size: int
    layout: torch.memory_format


def run(measuring: Measuring) -> None:
    """First what is promised of SCL, for each network; then the layouts, then torch.compile."""
    torch.backends.cudnn.benchmark = True
    models = MODELS[1:2] if measuring.is_rehearsal else MODELS
    batch, size = (2, 64) if measuring.is_rehearsal else (BATCH, SIZE)
    wanted = [(Case(model, batch, size, torch.channels_last), "") for model in models]
    wanted += [(Case(models[0], batch, size, torch.contiguous_format), ", contiguous")]
    for case, remark in wanted:
        if not measuring.has(20):
            measuring.add("left out for lack of time, from", f"{case.model}{remark}")
            return
        _compare(measuring, case, f"{case.model}, batch {case.batch}{remark}")
    # Compiling takes a minute and more.
    for model in models[:1]:
        if measuring.has(90):
            case = Case(model, batch, size, torch.channels_last)
            _compiled(measuring, case, f"{case.model}, batch {case.batch}, torch.compile")


def _compare(measuring: Measuring, case: Case, label: str) -> None:
    device = measuring.device
    builders: dict[str, Callable[[], Callable[[], object]]] = {
        "dense": lambda: step_of(case, device, dense),
        "SCL": lambda: step_of(case, device, scl),
        "timm": lambda: step_of(case, device, timms),
    }
    if device.type == "cuda":
        peaks = {}
        # While cuDNN tries its algorithms out, it takes what memory there is: not from the first.
        _peak(builders["dense"], device)
        for name, build in builders.items():
            peaks[name] = _peak(build, device)
            measuring.add(f"{label}: peak memory, {name}", peaks[name] / 1e6, "MB")
        measuring.add(f"{label}: memory, SCL ÷ dense", peaks["SCL"] / peaks["dense"], "×")
    steps = {name: build() for name, build in builders.items()}
    _time(measuring, case, label, steps)
    del steps
    _free(device)


def _compiled(measuring: Measuring, case: Case, label: str) -> None:
    device = measuring.device
    steps = {
        name: step_of(case, device, optimizer, compiled=True)
        for name, optimizer in (("dense", dense), ("SCL", scl))
    }
    _time(measuring, case, label, steps)
    del steps
    _free(device)


def _time(
    measuring: Measuring, case: Case, label: str, steps: dict[str, Callable[[], object]]
) -> None:
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    rounds = in_turn(steps, measuring.device, 2 if measuring.is_rehearsal else ROUNDS)
    for name in steps:
        taken = median(rounds, name)
        measuring.add(f"{label}: a step, {name}", 1e3 * taken, "ms")
        measuring.add(f"{label}: {name}", case.batch / taken, "images/s")
    measuring.add(f"{label}: SCL ÷ dense", median_ratio(rounds, "SCL", "dense"), "×", "≤ 1.02")
    if "timm" in steps:
        measuring.add(f"{label}: SCL ÷ timm's loop", median_ratio(rounds, "SCL", "timm"), "×")


def step_of(
    case: Case,
    device: torch.device,
    optimizer_of: Callable[[nn.Module], Optimizer],
    *,
    compiled: bool = False,
) -> Callable[[], object]:
    """Forward in bfloat16 where that is safe, backward, update, as timm's train.py does them."""
    torch.manual_seed(0)
    model = timm.create_model(case.model, num_classes=1000).to(device)
    model = model.to(memory_format=case.layout)
    optimizer = optimizer_of(model)
    model.train()
    network: Any = torch.compile(model) if compiled else model
    images = torch.randn(case.batch, 3, case.size, case.size, device=device)
    images = images.to(memory_format=case.layout)
    labels = torch.randint(0, 1000, (case.batch,), device=device)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = cross_entropy(network(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def dense(model: nn.Module) -> Optimizer:
    fused = next(model.parameters()).is_cuda
    return torch.optim.SGD(
        model.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=fused
    )


def scl(model: nn.Module) -> Optimizer:
    return SCL(connection_groups(model), lr=LR, lam=0.1, momentum=0.9, weight_decay=1e-4)


def timms(model: nn.Module) -> Optimizer:
    return create_optimizer_v2(model, "sgd", lr=LR, momentum=0.9, weight_decay=1e-4)


def _peak(build: Callable[[], Callable[[], object]], device: torch.device) -> int:
    """Bytes at the peak of a few steps with everything they need, model included."""
    _free(device)
    base = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step = build()
    for _ in range(2):
        step()
    del step
    return torch.cuda.max_memory_allocated(device) - base


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
