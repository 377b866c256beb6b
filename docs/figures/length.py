"""What one λ leaves in trainings of other lengths, and why no `mask_lr` makes it the same.

    python docs/figures/length.py

On scikit-learn's digits with `mask_lr: auto`: densities in 3 to 100 epochs on three networks; on
the MLP at other learning rates of the weights; and top-1 beside density where connections die
sooner than `auto` has it. Prints the tables of docs/lambda.md. About 20 minutes on one core.
"""

from __future__ import annotations

import importlib
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import defaults
from sclcore import Schedule

figure = importlib.import_module("docs.figures.lambda")
EPOCHS = (3, 10, 40, 100)
LAMBDAS = (0.1, 0.2, 0.4, 0.8)
SHARES = (0.3, 0.1, 0.03)
SEEDS = range(3)
MASK_MOMENTUM = 0.9


def by_length() -> None:
    lengths = " | ".join(f"{epochs} epochs" for epochs in EPOCHS)
    print(f"| network | λ | {lengths} | from 10 to 100 | from 3 to 100 |")
    print("| --- | --- |" + " --- |" * (len(EPOCHS) + 2))
    for network in figure.MODELS:
        for lam in LAMBDAS:
            found = [figure.train(network, epochs, lam) for epochs in EPOCHS]
            apart = [max(some) / min(some) for some in (found[1:], found)]
            cells = [f"{density:.2%}" for density in found] + [f"{factor:.2f}" for factor in apart]
            print(f"| {network} | {lam:g} | {' | '.join(cells)} |", flush=True)


def by_learning_rate() -> None:
    [network] = [name for name in figure.MODELS if "MLP" in name]
    print("\n| MLP, λ 0.2, learning rate × | 10 epochs | 40 epochs |\n| --- | --- | --- |")
    for faster in (0.3, 1, 3):
        found = [figure.train(network, epochs, 0.2, faster=faster) for epochs in (10, 40)]
        print(f"| {faster:g} | {found[0]:.2%} | {found[1]:.2%} |", flush=True)


def by_share() -> None:
    """Means over the seeds of (density, top-1), by the share of the mask phase that death takes."""
    print(f"\n| ConvNet, dies in | epochs | {' | '.join(f'λ {lam:g}' for lam in LAMBDAS)} |")
    print("| --- | --- |" + " --- |" * len(LAMBDAS))
    updates = len(defaults.samples("train")[1]) // defaults.BATCH
    for epochs in EPOCHS[:2]:
        steps = Schedule().mask_steps(epochs * updates)
        for share in SHARES:
            cells = []
            for lam in LAMBDAS:
                mask_lr = (1 - MASK_MOMENTUM) / (share * steps * lam)
                defaults.SETTINGS["share"] = {"scl": {"mask_lr": mask_lr}}
                runs = [defaults.train(("ConvNet", "share", lam, s, epochs)) for s in SEEDS]
                top1, density = map(statistics.fmean, zip(*runs, strict=True))
                cells.append(f"{density:.2%}: {top1:.2%}")
            print(f"| {share:g} of the time | {epochs} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    by_length()
    by_learning_rate()
    by_share()
