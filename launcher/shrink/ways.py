"""The ways to choose what goes, each from a network to a smaller one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from launcher.errors import UsageError
from launcher.shrink.asked import Asked
from launcher.shrink.samples import Samples
from launcher.shrink.stopwatch import Stopwatch
from sclcore.export.cut import Cut
from sclcore.export.cutting import apply_cut
from sclcore.export.shrink.contributions import contributions, margins, sensitivity
from sclcore.export.shrink.dependence import Dependences
from sclcore.export.shrink.latency import LatencyModel, fit_into
from sclcore.export.shrink.units import Units
from sclcore.export.shrink.votes import votes

Say = Callable[[str], object]


@dataclass(frozen=True)
class Smaller:
    """A network without some units: the model, the cut that made it, what is to be said of it.

    `cut` is None where nothing could go.
    """

    model: nn.Module
    cut: Cut | None
    facts: Mapping[str, Any] = field(default_factory=dict)


def make_smaller(
    model: nn.Module,
    example: Tensor,
    samples: Samples,
    asked: Asked,
    stopwatch: Stopwatch | None,
    part: float,
    say: Say,
) -> Smaller:
    """One cut of `model`, in evaluation mode, as `asked`; `example` is one image.

    `part`: which share of the way to a budget this cut goes, 1 all of it. `stopwatch` is needed for
    latencies alone. Raises UsageError where the budget is below what any network reaches.
    """
    units = Units(model, example)
    say(f"{units.count:,} units can go")
    if asked.by == "latency":
        assert stopwatch is not None
        return _by_latency(model, units, example, samples, asked, stopwatch, part, say)
    if asked.by == "dependence":
        return _by_dependence(model, units, samples, asked)
    return _by_votes(model, units, samples, asked)


def _by_latency(
    model: nn.Module,
    units: Units,
    example: Tensor,
    samples: Samples,
    asked: Asked,
    stopwatch: Stopwatch,
    part: float,
    say: Say,
) -> Smaller:
    scores = sensitivity(contributions(model, units, samples))
    images = random_images(example, asked.batch)
    say("measuring layers")
    latency = LatencyModel(model, units, images, stopwatch)
    budget = asked.latency_ms or (asked.latency or 0) * stopwatch.today
    lowest = latency.measured[-1]
    if budget < lowest:
        raise UsageError(_too_fast(budget, lowest, stopwatch))
    aim = stopwatch.today * (budget / stopwatch.today) ** part
    now = latency.measured[0]
    if now <= aim:
        return Smaller(model, None, {"aim_ms": aim, "now_ms": now})
    promise = fit_into(latency, scores, aim, say)
    if promise.measured > 1.05 * aim:
        raise UsageError(_too_fast(aim, promise.measured, stopwatch))
    smaller = cut_away(model, units, promise.gone)
    # Anew: the search has stopped at a measurement that was to its liking.
    measured = stopwatch({0: lambda: smaller.model(images)})[0]
    wall = stopwatch.on_the_wall(lambda: smaller.model(images))
    facts = {
        "budget_ms": budget,
        "aim_ms": aim,
        "promised_ms": promise.milliseconds,
        "measured_ms": measured,
        "error": promise.milliseconds / measured - 1,
        "today_ms": stopwatch.today,
        "lowest_ms": lowest,
        "wall_ms": wall[1],
        "wall_today_ms": wall[0],
        "clock": "processor time" if asked.threads == 1 else "wall",
        "table_points": latency.table.points,
    }
    return Smaller(smaller.model, smaller.cut, facts)


def _too_fast(budget: float, lowest: float, stopwatch: Stopwatch) -> str:
    return (
        f"a latency of {budget:.3g} ms is below what any cut of this network reaches here: the "
        f"lowest is {lowest:.3g} ms ({lowest / stopwatch.today:.1%} of today's "
        f"{stopwatch.today:.3g} ms); ask for more"
    )


def _by_dependence(model: nn.Module, units: Units, samples: Samples, asked: Asked) -> Smaller:
    dependences = Dependences(model, units, [images for images, _ in samples])
    lossless = asked.share is None
    most = math.ceil((asked.share or 1) * units.count)
    found = dependences.find(most, None if lossless else math.inf)
    if not found.gone.any():
        return Smaller(model, None, {"lossless": lossless})
    smaller = dependences.remove(found.gone)
    facts = {
        "lossless": lossless,
        "error": found.error,
        "difference": difference(model, smaller, samples[0][0]),
    }
    return Smaller(smaller, units.cut(found.gone), facts)


def _by_votes(model: nn.Module, units: Units, samples: Samples, asked: Asked) -> Smaller:
    assert asked.share is not None
    labels = torch.cat([labels for _, labels in samples])
    share = votes(contributions(model, units, samples, margins), labels, units)
    keep = units.best_of_each_dimension(share)
    order = share.masked_fill(keep, torch.inf).argsort(stable=True)
    most = min(math.ceil(asked.share * units.count), int((~keep).sum()))
    gone = torch.zeros(units.count, dtype=torch.bool)
    gone[order[:most]] = True
    if not gone.any():
        return Smaller(model, None)
    return cut_away(model, units, gone, {"votes_of_the_last": float(share[order[most - 1]])})


def cut_away(
    model: nn.Module, units: Units, gone: Tensor, facts: Mapping[str, Any] | None = None
) -> Smaller:
    """`model` without the units `gone`."""
    cut = units.cut(gone)
    smaller = copy.deepcopy(model).eval()
    apply_cut(smaller, cut)
    return Smaller(smaller, cut, facts or {})


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module, images: Tensor) -> float:
    """The largest difference of an output, as a share of the largest output."""
    expected, found = one(images), other(images)
    return float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-30))


def random_images(example: Tensor, batch: int) -> Tensor:
    """Not zeros: kernels may treat those in their own way."""
    shape = (batch, *example.shape[1:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(example.dtype)
