"""Why masks hover, and what a fresh start does about it: m of connections over time.

    python docs/figures/hovering.py

Trains the comparison's network on three splits of the digits as SCL was until 0.1 (rms over the
feature, a revived connection goes on from where it is) and as it is now, with every mask variable
noted at each update while masks learn. Prints, of the connections that were alive when masks froze,
for how much of the last half they had been; writes docs/figures/hovering.png. About a minute.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from torch.nn.functional import cross_entropy
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.defaults import shifted
from docs.figures.split_training import split
from launcher.models.small import SmallConvNet
from sclcore import SCL, Schedule, Scheduler, connection_groups

SPLITS = (0, 1, 2)
EPOCHS, BATCH = 40, 64
SCHEDULE = Schedule(freeze_masks_at=0.5)
# Both leave about 5 %.
KINDS = {
    "before": {"normalize": "feature", "mask_restart": 0.0, "lam": 0.315, "mask_lr": 1.6e-3},
    "now": {"normalize": "network", "mask_restart": 1.0, "lam": 0.28, "mask_lr": 2.8e-3},
}


@dataclass(frozen=True)
class Course:
    """m of all connections [updates, connections], while masks learn."""

    m: np.ndarray

    @property
    def late(self) -> np.ndarray:
        """Whether each was alive, in the last half of the time in which masks learn."""
        return self.m[len(self.m) // 2 :] > 0

    @property
    def kept(self) -> np.ndarray:
        return self.m[-1] > 0

    @property
    def time_alive(self) -> np.ndarray:
        return self.late.mean(0)


def trained(kind: str, number: int) -> Course:
    torch.manual_seed(number)
    digits = split(number)
    model = SmallConvNet(width=16)
    settings: dict[str, Any] = {"lr": 0.1, "nesterov": True, "weight_decay": 5e-4, **KINDS[kind]}
    optimizer = SCL(connection_groups(model), **settings)
    scheduler = Scheduler(optimizer, SCHEDULE)
    generator = torch.Generator().manual_seed(number)
    per_epoch = len(digits.train) // BATCH
    noted: list[np.ndarray] = []
    order = torch.empty(0)
    for step in tqdm(
        range(EPOCHS * per_epoch // 2), desc=f"{kind} {number}", leave=False, disable=None
    ):
        if step % per_epoch == 0:
            order = digits.train[torch.randperm(len(digits.train), generator=generator)]
        scheduler.set_progress(step / (EPOCHS * per_epoch))
        chosen = order[step % per_epoch * BATCH :][:BATCH]
        optimizer.zero_grad()
        images = shifted(digits.images[chosen], generator)
        cross_entropy(model(images), digits.labels[chosen]).backward()
        optimizer.step()
        variables = [m.flatten() for m in optimizer.mask_variables().values()]
        noted.append(torch.cat(variables).numpy().astype(np.float32))
    return Course(np.stack(noted))


def examples(course: Course) -> dict[str, int]:
    """A connection that is worth keeping, by its revivals and time alive, and one that is not."""
    alive = course.m > 0
    revivals = (alive[1:] & ~alive[:-1]).sum(0)
    worth = np.where(course.time_alive > 0.6, revivals, -1)
    died_once = np.flatnonzero((revivals == 0) & ~course.kept)
    middle = died_once[np.argsort(course.m[-1, died_once])[len(died_once) // 2]]
    return {"one worth keeping": int(worth.argmax()), "a useless one": int(middle)}


def draw_course(axes: Axes, course: Course, title: str) -> None:
    for (label, place), colour in zip(examples(course).items(), ("C0", "0.6"), strict=True):
        axes.plot(course.m[:, place], color=colour, lw=1, label=label)
    axes.axhline(0, color="black", lw=0.6)
    axes.set(xlabel="update", ylabel="mask variable m", ylim=(-1.3, 1.8))
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, loc="lower left")


def main() -> None:
    courses = {kind: [trained(kind, number) for number in SPLITS] for kind in KINDS}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    draw_course(axes[0], courses["before"][0], "Before: it hovers")
    draw_course(axes[1], courses["now"][0], "Now: it begins anew")
    for (kind, of_kind), colour in zip(courses.items(), ("C1", "C0"), strict=True):
        wrong = [not_longest(course) for course in of_kind]
        axes[2].bar(kind, np.mean(wrong), color=colour, width=0.5)
        axes[2].plot([kind] * len(wrong), wrong, "o", color="black", ms=3)
        alive = np.mean([course.time_alive[course.kept].mean() for course in of_kind])
        print(
            f"{kind}: density {np.mean([c.kept.mean() for c in of_kind]):.2%}; alive for "
            f"{alive:.1%} of the last half on average; {np.mean(wrong):.1%} of those kept were "
            f"not among the longest alive (splits: {', '.join(f'{x:.1%}' for x in wrong)})"
        )
    axes[2].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes[2].set_title("Kept, but not among the longest alive", fontsize=10)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)


def not_longest(course: Course) -> float:
    count = int(course.kept.sum())
    longest = np.argsort(-course.time_alive, kind="stable")[:count]
    return 1 - course.kept[longest].mean()


if __name__ == "__main__":
    main()
