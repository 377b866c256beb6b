"""What λ leaves, on three networks and in two lengths of training; and what lives under a target.

    python docs/figures/lambda.py

Trains the demo's ConvNet in two widths and an MLP on scikit-learn's digits until their masks are
final: at four λ, in 10 epochs and in 40, with `mask_lr: auto`; the larger ConvNet also for three
target densities. From 10 epochs at λ 0.2 `scl forecast` would foretell the 40 at any λ, said beside
them. Prints tables for docs/lambda.md, writes docs/figures/lambda.png. Five minutes on one core.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import NullLocator, PercentFormatter
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.defaults import BATCH, LR, NETWORKS, samples, shifted
from launcher.models import SmallConvNet
from sclcore import SCL, Schedule, Scheduler, connection_groups
from sclcore.methods.scl import SCLMethod
from sclcore.scl.controller import Steering, TargetController

MODELS: dict[str, Callable[[], nn.Module]] = {
    "ConvNet, 58,144 connections": NETWORKS["ConvNet"],
    "ConvNet, 15,248 connections": lambda: SmallConvNet(width=16),
    "MLP, 50,200 connections": NETWORKS["MLP"],
}
LAMBDAS = (0.1, 0.2, 0.4, 0.8)
TARGETS = (0.1, 0.05, 0.02)
SHORT, LONG = 10, 40
OF_FORECAST = 0.2
SCHEDULE = Schedule(freeze_masks_at=0.5)


def train(
    network: str, epochs: int, lam: float | None, target: float | None = None, faster: float = 1.0
) -> float:
    """The density when the masks are final; `faster` is a factor of the learning rate."""
    return densities(network, epochs, lam, target, faster)[-1]


def densities(
    network: str, epochs: int, lam: float | None, target: float | None = None, faster: float = 1.0
) -> list[float]:
    """The density before each update of the mask phase, and when the masks are final."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = MODELS[network]()
    images, labels = samples("train")
    per_epoch = len(labels) // BATCH
    total = per_epoch * epochs
    method = SCLMethod(lam=lam, target_density=target).for_run(SCHEDULE, total)
    optimizer = SCL(
        connection_groups(model),
        lr=faster * (LR if "ConvNet" in network else LR / 2),
        lam=lam or 0.0,
        mask_lr=float(method.mask_lr),
        nesterov=True,
        weight_decay=5e-4,
    )
    scheduler = Scheduler(optimizer, SCHEDULE)
    names = optimizer.param_groups[0]["names"]
    controller = TargetController(
        optimizer,
        target=target or 0.5,
        weights=dict.fromkeys(names, 1.0),
    )
    steering = Steering()
    steps = round(SCHEDULE.mask_steps(total))
    order, found = torch.empty(0), []
    for step in tqdm(range(steps), desc=f"{network}, λ {lam}", leave=False, disable=None):
        if step % per_epoch == 0:
            order = torch.randperm(len(labels), generator=generator)
        if target:
            steering = controller.steer(SCHEDULE.mask_travel(step / total), steering)
        scheduler.set_progress(step / total, lam=steering.lam if target else None)
        chosen = order[step % per_epoch * BATCH :][:BATCH]
        found.append(controller.reached())
        optimizer.zero_grad()
        cross_entropy(model(shifted(images[chosen], generator)), labels[chosen]).backward()
        optimizer.step()
    if target:
        controller.steer(1.0, steering)
    return [*found, controller.reached()]


def off_by(predictions: list[float], actual: list[float]) -> tuple[float, float]:
    """(geometric mean, largest) factor between them."""
    logs = [abs(math.log(p / a)) for p, a in zip(predictions, actual, strict=True)]
    return math.exp(sum(logs) / len(logs)), math.exp(max(logs))


def main() -> None:
    torch.set_num_threads(1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for colour, network in zip(("C0", "C1", "C2"), MODELS, strict=True):
        short, long = ([train(network, epochs, lam) for lam in LAMBDAS] for epochs in (SHORT, LONG))
        base = short[LAMBDAS.index(OF_FORECAST)]
        forecast = [min(1.0, base * OF_FORECAST / lam) for lam in LAMBDAS]
        print(f"\n{network}\n\n| λ | {SHORT} epochs | {LONG} epochs | ÷ | forecast |")
        print("| --- | --- | --- | --- | --- |")
        for lam, a, b, guess in zip(LAMBDAS, short, long, forecast, strict=True):
            print(f"| {lam:g} | {a:.2%} | {b:.2%} | {a / b:.2f} | {guess:.2%} |")
        mean, largest = off_by(forecast, long)
        print(f"forecast off by a factor of {mean:.2f} (geometric mean), {largest:.2f} at most")
        left.plot(LAMBDAS, short, "o--", color=colour, lw=1, ms=4)
        left.plot(LAMBDAS, long, "o-", color=colour, ms=4, label=network)
    left.plot(LAMBDAS, [0.014 / lam for lam in LAMBDAS], color="0.6", lw=1, label="1.4 % / λ")
    left.set(xscale="log", yscale="log", xlabel="λ", ylabel="density when the masks are final")
    left.set_title(f"One λ: {LONG} epochs, and {SHORT} (dashed)", fontsize=10)
    left.xaxis.set_ticks(LAMBDAS, [f"{lam:g}" for lam in LAMBDAS])
    left.xaxis.set_minor_locator(NullLocator())
    for target in TARGETS:
        course = densities(next(iter(MODELS)), LONG, None, target)
        print(f"target {target:.0%}: {course[-1]:.4%}", flush=True)
        per_epoch = (len(course) - 1) / (SCHEDULE.freeze_masks_at * LONG)
        epochs = [step / per_epoch for step in range(len(course))]
        right.plot(epochs, course, lw=1.2, label=f"target_density: {target:g}")
    right.set(yscale="log", xlabel="epoch", ylabel="density")
    right.set_title("A target: what lives, epoch by epoch", fontsize=10)
    for axes in (left, right):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.legend(frameon=False, fontsize=8, loc="lower left")
        axes.grid(alpha=0.3)
    figure.savefig(Path(__file__).with_name("lambda.png"), dpi=150)


if __name__ == "__main__":
    main()
