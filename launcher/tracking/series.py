"""Every series that a run promises, in one place; docs/tracking.md has the same list."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Of = Literal["all", "ema", "masks", "scl"]
"""Whose runs have it: all, those that average weights (`optim.ema_decay`), those whose optimizer
owns masks, or those that learn them (scl)."""


@dataclass(frozen=True)
class Series:
    """One series of a run's record; `<layer>` in its name stands for the name of each layer.

    `at` says when it comes: with each logged interval (`line`), with each evaluation (`epoch`), or
    with both. `while_learning`: only until masks are frozen. `best` is what W&B's summary keeps of
    it beside the last value.
    """

    name: str
    at: Literal["line", "epoch", "both"]
    of: Of
    meaning: str
    best: Literal["max", "min"] | None = None
    while_learning: bool = False

    def names(self, layers: Iterable[str]) -> list[str]:
        """The names it has in a run whose layers with masks are `layers`."""
        return list(dict.fromkeys(self.name.replace("<layer>", layer) for layer in layers))


SERIES = (
    Series("train/loss", "line", "all", "mean loss over the samples of the interval", "min"),
    Series("train/top1", "line", "all", "top-1 accuracy on them, 0 to 1", "max"),
    Series("train/top5", "line", "all", "top-5 accuracy on them", "max"),
    Series("train/grad_norm", "line", "all", "2-norm of the last update's gradient, unclipped"),
    Series("train/skipped_steps", "line", "all", "updates skipped so far: gradient not finite"),
    Series("val/loss", "epoch", "all", "cross entropy on the validation split", "min"),
    Series("val/top1", "epoch", "all", "top-1 accuracy, each sample exactly once", "max"),
    Series("val/top5", "epoch", "all", "top-5 accuracy", "max"),
    Series("ema/loss", "epoch", "ema", "cross entropy of the averaged weights there", "min"),
    Series("ema/top1", "epoch", "ema", "their top-1 accuracy", "max"),
    Series("ema/top5", "epoch", "ema", "their top-5 accuracy", "max"),
    Series("val/corrupt", "epoch", "all", "validation samples that could not be decoded"),
    Series("data/corrupt", "line", "all", "training samples so far that could not be decoded"),
    Series("lr", "line", "all", "learning rate of the weights"),
    Series("lam", "line", "scl", "λ as it acts now (`schedule.lam_warmup`)"),
    Series("mask_lr", "line", "scl", "learning rate of the mask variables; 0 once they are frozen"),
    Series("connections/live", "both", "all", "live connections", "min"),
    Series("connections/density", "both", "all", "their share of all connections", "min"),
    Series("connections/macs", "both", "all", "MACs of one sample with the live ones", "min"),
    Series("connections/macs_share", "both", "all", "the same as a share of the dense MACs", "min"),
    Series("density/<layer>", "epoch", "masks", "density of a layer"),
    Series("macs/<layer>", "epoch", "masks", "MACs of a layer with its live connections"),
    Series(
        "masks/flips",
        "line",
        "masks",
        "masks that changed in the interval; scl: every change in every update of it, others: "
        "against the line before",
    ),
    Series("masks/revivals", "line", "masks", "those of them that came to life"),
    Series("masks/hovering", "line", "masks", "the same per live connection: 0 once masks settle"),
    Series("masks/near_zero", "line", "scl", "share of mask variables within ±0.1 of 0"),
    Series("masks/q05", "line", "scl", "5 % quantile of the mask variables"),
    Series("masks/median", "line", "scl", "their median"),
    Series("masks/q95", "line", "scl", "their 95 % quantile"),
    Series(
        "masks/histogram",
        "epoch",
        "scl",
        "mask variables by value: 40 bins of 0.05 from −1 to 1, the outer ones hold what lies "
        "beyond; the first 20 are dead",
    ),
    Series(
        "masks/imbalance_before",
        "line",
        "scl",
        "largest ÷ median rms of the mask gradient over the features of a layer, before "
        "normalisation; the worst layer",
        while_learning=True,
    ),
    Series(
        "masks/imbalance_after",
        "line",
        "scl",
        "the same after normalisation",
        while_learning=True,
    ),
    Series(
        "masks/dead_features",
        "line",
        "scl",
        "features that receive no mask gradient at all",
        while_learning=True,
    ),
    Series(
        "imbalance/<layer>",
        "epoch",
        "scl",
        "imbalance of a layer before normalisation",
        while_learning=True,
    ),
    Series("speed/images_per_s", "line", "all", "samples per second, all ranks together", "max"),
    Series("speed/step_s", "line", "all", "seconds per update, with all that lies between"),
    Series("speed/data_wait", "line", "all", "share of the time spent waiting for data, rank 0"),
    Series("speed/memory_gib", "line", "all", "peak memory of rank 0: its GPU's, else its own"),
)
