"""What a shrinking was asked for, and whether that can be."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from launcher.errors import UsageError

WAYS = ("latency", "dependence", "votes")
REPORT = "shrink.json"
BEGUN = "asked.json"


@dataclass(frozen=True)
class Asked:
    """See `scl shrink --help`. `share` and `latency` are shares of 1, `tolerance` is in points."""

    source: Path
    out: Path
    by: str
    share: float | None = None
    latency_ms: float | None = None
    latency: float | None = None
    batch: int = 1
    threads: int = 1
    rounds: int = 20
    samples: int = 1024
    cuts: int = 1
    epochs: int = 0
    tolerance: float = 0.5
    data: str | None = None
    overrides: tuple[str, ...] = ()

    @property
    def in_one(self) -> bool:
        """Whether there is one cut, and nothing is trained."""
        return self.cuts == 1 and not self.epochs

    def as_dict(self) -> dict[str, Any]:
        """Plain values, to tell whether the same is asked for again."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()} | {
            "overrides": list(self.overrides)
        }


def check_asked(asked: Asked) -> None:
    """Raises UsageError where the options contradict each other, or the folder is in use."""
    numbers = (
        ("--batch", asked.batch, 1),
        ("--threads", asked.threads, 1),
        ("--rounds", asked.rounds, 1),
        ("--samples", asked.samples, 1),
        ("--cuts", asked.cuts, 1),
        ("--epochs", asked.epochs, 0),
    )
    for option, value, least in numbers:
        if value < least:
            raise UsageError(f"{option} is {value}; it must be at least {least}")
    if asked.tolerance < 0:
        raise UsageError(f"--tolerance is {asked.tolerance:g}; it is 0 points or more")
    _check_way(asked)
    out = asked.out
    begun = (out / BEGUN).is_file()
    if out.exists() and not begun and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} exists: choose another folder, or remove it first")


def _check_way(asked: Asked) -> None:
    budgets = [b for b in (asked.latency_ms, asked.latency) if b is not None]
    if asked.by == "latency":
        if len(budgets) != 1:
            raise UsageError(
                "--by latency needs one budget: --latency-ms 5, or --latency 50% of today's"
            )
        if asked.share is not None:
            raise UsageError("--share is for --by dependence and votes: a budget is met as it is")
    elif budgets:
        raise UsageError(f"a latency is a budget of --by latency, and --by {asked.by} has none")
    if asked.by == "votes" and asked.share is None:
        raise UsageError("--by votes needs --share: how many units one cut takes, such as 10%")
    if asked.by == "dependence" and asked.share is None and asked.cuts > 1:
        raise UsageError(
            "--by dependence without --share takes all that is exact in one cut: leave --cuts out, "
            "or say by --share 10% how much each takes"
        )
    for option, value in (("--share", asked.share), ("--latency", asked.latency)):
        if value is not None and not 0 < value < 1:
            raise UsageError(f"{option} is {value:.4g} of 1; it must lie between 0% and 100%")
    if asked.latency_ms is not None and asked.latency_ms <= 0:
        raise UsageError(f"--latency-ms is {asked.latency_ms:g}; it must be above 0")


def share_of(option: str, text: str) -> float:
    """`50%` or `0.5` as a share of 1. Raises UsageError."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise UsageError(f"{option} {text}: should be a share, such as 50% or 0.5") from None
