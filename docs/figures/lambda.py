"""What `scl forecast` predicts and what a target density gives, against what happened.

    python docs/figures/lambda.py

Trains the demo's ConvNet and an MLP on scikit-learn's digits until their masks are final: at seven
λ; for four target densities; and, for the forecast, for a quarter of that time at one λ. Prints two
tables and writes docs/figures/lambda.png. About ten minutes on one core.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import NullLocator
from torch.nn.functional import cross_entropy
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.defaults import BATCH, LR, NETWORKS, samples, shifted
from sclcore import SCL, Schedule, Scheduler, connection_groups
from sclcore.scl.controller import TargetController
from sclcore.scl.forecast import Moment, forecast

LAMBDAS = (0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 0.9)
TARGETS = (0.2, 0.1, 0.05, 0.02)
LAM_OF_FORECAST = 0.28
# Those of recipes/paper/digits.yaml, without the epochs in which the masks are final.
SCHEDULE = Schedule(freeze_masks_at=0.5)
EPOCHS, MASK_LR = 40, 0.0016


def train(
    network: str,
    lam: float,
    *,
    target: float | None = None,
    share: float = 1.0,
    after: Callable[[float, SCL], None] | None = None,
) -> float:
    """The density after `share` of the time in which masks are learned; `after` sees each step."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = NETWORKS[network]()
    optimizer = SCL(
        connection_groups(model),
        lr=LR if network == "ConvNet" else LR / 2,
        lam=lam,
        mask_lr=MASK_LR,
        nesterov=True,
        weight_decay=5e-4,
    )
    scheduler = Scheduler(optimizer, SCHEDULE)
    group = optimizer.param_groups[0]
    images, labels = samples("train")
    per_epoch = len(labels) // BATCH
    total = per_epoch * EPOCHS
    controller = TargetController(
        optimizer,
        target=target or 0.5,
        weights=dict.fromkeys(group["names"], 1.0),
        steps=SCHEDULE.mask_steps(total),
    )
    steering = controller.start
    steps = round(share * SCHEDULE.mask_steps(total))
    order = torch.empty(0)
    for step in tqdm(range(steps), desc=f"{network} λ {lam:g}", leave=False, disable=None):
        if step % per_epoch == 0:
            order = torch.randperm(len(labels), generator=generator)
        scheduler.set_progress(step / total)
        if target:
            steering = controller.steer(SCHEDULE.mask_travel(step / total), steering)
            group["lam"] = steering.lam
        first = step % per_epoch * BATCH
        chosen = order[first : first + BATCH]
        optimizer.zero_grad()
        cross_entropy(model(shifted(images[chosen], generator)), labels[chosen]).backward()
        optimizer.step()
        if after is not None:
            after(SCHEDULE.mask_travel((step + 1) / total), optimizer)
    return controller.reached()


def predicted(network: str) -> list[float]:
    """The density that each of LAMBDAS would leave, from a quarter of the time at one λ."""
    moments: list[Moment] = []

    def note(travel: float, optimizer: SCL) -> None:
        if any(math.isclose(travel, at, abs_tol=1e-9) for at in (0.125, 0.25)):
            masks = {name: m.clone() for name, m in optimizer.mask_variables().items()}
            moments.append(Moment(travel, masks))

    train(network, LAM_OF_FORECAST, share=0.25, after=note)
    earlier, now = moments
    total = SCHEDULE.mask_steps(len(samples("train")[1]) // BATCH * EPOCHS)
    sizes = {name: m.numel() for name, m in now.masks.items()}
    found = []
    for lam in LAMBDAS:
        shares = forecast(
            earlier,
            now,
            lam=LAM_OF_FORECAST,
            other=lam,
            reach=MASK_LR / 0.1 * total,
            costs=dict.fromkeys(sizes, 1.0),
        )
        found.append(sum(shares[n] * sizes[n] for n in sizes) / sum(sizes.values()))
    return found


def off_by(predictions: list[float], actual: list[float]) -> tuple[float, float]:
    """(geometric mean, largest) factor between them."""
    logs = [abs(math.log(p / a)) for p, a in zip(predictions, actual, strict=True)]
    return math.exp(sum(logs) / len(logs)), math.exp(max(logs))


Results = dict[str, tuple[list[float], list[float], list[float]]]
"""By network: densities forecast and actual at LAMBDAS, and reached at TARGETS."""


def draw(results: Results) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for (network, (guess, actual, reached)), colour in zip(
        results.items(), ("C0", "C1"), strict=True
    ):
        left.plot(LAMBDAS, actual, "o-", color=colour, label=f"{network}, whole training")
        left.plot(LAMBDAS, guess, "x--", color=colour, label=f"{network}, forecast")
        right.plot(TARGETS, reached, "o", color=colour, label=network)
    left.set(xscale="log", yscale="log", xlabel="λ", ylabel="density when the masks are final")
    left.set_title("scl forecast, after a quarter of the time", fontsize=10)
    right.plot(TARGETS, TARGETS, color="0.6", lw=1, label="as asked")
    right.set(xscale="log", yscale="log", xlabel="target_density", ylabel="density reached")
    right.set_title("method.target_density", fontsize=10)
    for axis in (right.xaxis, right.yaxis):
        axis.set_ticks(TARGETS, [f"{target:g}" for target in TARGETS])
        axis.set_minor_locator(NullLocator())
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8, loc="lower left" if axes is left else "upper left")
        axes.grid(alpha=0.3)
    figure.savefig(Path(__file__).with_name("lambda.png"), dpi=150)


def main() -> None:
    torch.set_num_threads(1)
    results: Results = {}
    for network in NETWORKS:
        guess = predicted(network)
        actual = [train(network, lam) for lam in LAMBDAS]
        reached = [train(network, 0.0, target=target) for target in TARGETS]
        print(f"{network}\n| λ | predicted | actual |\n| --- | --- | --- |")
        for row in zip(LAMBDAS, guess, actual, strict=True):
            print(f"| {row[0]:g} | {row[1]:.2%} | {row[2]:.2%} |")
        mean, largest = off_by(guess, actual)
        print(f"off by a factor of {mean:.2f} (geometric mean), {largest:.2f} at most")
        print("| target | reached | off by |\n| --- | --- | --- |")
        for target, got in zip(TARGETS, reached, strict=True):
            print(f"| {target:.0%} | {got:.2%} | {got / target - 1:+.1%} |", flush=True)
        results[network] = guess, actual, reached
    draw(results)


if __name__ == "__main__":
    main()
