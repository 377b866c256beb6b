"""Weight sharing: the live weights of a tensor take few different values; zeros stay zeros.

Two ways, after Marinò, Ghidoli, Frasca and Malchiodi, "Compression strategies and space-conscious
representations for deep neural networks" (ICPR 2020), sections on weight sharing and probabilistic
quantisation:

- `kmeans`: the values are the means of clusters of neighbouring weights that have the least sum of
  squared distances (for layers of more than 1,024 live weights, the least that is found);
- `pq`: the values are quantiles χ_0 < χ_1 < … of the weights, the smallest and the largest among
  them; a weight w in [χ_i, χ_i+1] becomes χ_i+1 with probability (w − χ_i) / (χ_i+1 − χ_i), else
  χ_i, so that its expectation is w.

Values are sought among the live weights alone. The authors' code takes all entries, so that in a
matrix with 96 % of zeros nearly all quantiles are the same 0. And `count` is the number of values,
as in their code: quantiles at i / (count − 1), where their text cuts at i / b.

Values are per tensor, as there: the weights of layers differ in scale by their fan-in, so that
values for a whole network would mostly be spent on the layers with the largest weights, and a
dictionary of k values, 4k bytes, is small beside a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Reals = NDArray[np.float64]
Indices = NDArray[np.int64]
_MOST_EXACT = 256
_MOST_BINS = 1024
_ROUNDS = 300


@dataclass(frozen=True)
class Sharing:
    """How weights are shared: `count` values for each tensor, by `kind`: kmeans, or pq with `seed`.

    Raises ValueError for another kind, or less than two values.
    """

    kind: str
    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("kmeans", "pq") or self.count < 2:
            raise ValueError(f"{self.kind}:{self.count} should be kmeans or pq of 2 values or more")


class Shared(NamedTuple):
    """`values` [k], ascending, none of them 0, in the type of the weights; `index` [live], int64:
    which of them each live weight has, in row-major order."""

    values: Tensor
    index: Tensor


def share(weight: Tensor, sharing: Sharing) -> Shared:
    """The values of `weight` (any shape, floating point), and which live weight has which.

    A weight with no more different values than `sharing.count` keeps them as they are. The same
    weight and sharing give the same result. Raises ValueError for weights that are not finite.
    """
    live = weight.detach().cpu().flatten()
    live = live[live != 0]
    if not bool(torch.isfinite(live).all()):
        raise ValueError("it holds values that are not finite, which cannot be shared")
    own, index = live.unique(return_inverse=True)
    if len(own) <= sharing.count:
        return Shared(own, index)
    weights = live.double().numpy()
    if sharing.kind == "kmeans":
        found = kmeans(weights, sharing.count)
    else:
        found = quantised(weights, sharing.count, np.random.default_rng(sharing.seed))
    values, index = torch.from_numpy(found[0]).to(weight.dtype), torch.from_numpy(found[1])
    # Rounded to the weight's type, two values may have become one.
    values, merged = values.unique(return_inverse=True)
    return Shared(_alive(values, live), merged[index])


def shared_weight(weight: Tensor, sharing: Sharing) -> Tensor:
    """`weight` with shared values, in its shape and type. Raises as `share` does."""
    values, index = share(weight, sharing)
    result = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    result[weight != 0] = values[index].to(weight.device)
    return result


def kmeans(weights: Reals, count: int) -> tuple[Reals, Indices]:
    """(means [≤ count], ascending; index of its mean for each of `weights`).

    In one dimension clusters are runs of the sorted weights. Of up to 1,024 weights the best runs
    are found exactly, by dynamic programming; of more, the best runs of 1,024 bins at most, from
    which Lloyd's algorithm goes on with the weights themselves. For more than 256 values it starts
    from quantiles, equal steps and the means of both, and the best end is taken. Source: Lloyd,
    IEEE Trans. Information Theory 28 (1982) 129; Bellman, Math. Biosciences 18 (1973) 309.
    """
    ranked = np.sort(weights)
    # Around their mean, for the sake of the digits that the differences of sums lose.
    centre = ranked.mean()
    sums = np.concatenate([[0.0], np.cumsum(ranked - centre)])
    ends = [_lloyd(ranked, sums, start, centre) for start in _starts(ranked, count)]
    means, _ = max(ends, key=lambda end: end[1])
    return means, np.searchsorted(_between(means), weights)


def quantised(weights: Reals, count: int, generator: np.random.Generator) -> tuple[Reals, Indices]:
    """(quantiles [≤ count], ascending; index of its value for each of `weights`), drawn unbiased.

    Quantiles are weights themselves: none is 0, and weights that are equal give one value. At least
    two of `weights` must differ.
    """
    ranked = np.sort(weights)
    at = np.round(np.linspace(0, len(ranked) - 1, count)).astype(np.int64)
    cuts = np.unique(ranked[at])
    lower = np.clip(np.searchsorted(cuts, weights, side="right") - 1, 0, len(cuts) - 2)
    share_of_upper = (weights - cuts[lower]) / (cuts[lower + 1] - cuts[lower])
    return cuts, lower + (generator.random(len(weights)) < share_of_upper)


def _starts(ranked: Reals, count: int) -> list[Reals]:
    if count <= _MOST_EXACT:
        return [_best_runs(ranked, count)]
    steps = np.linspace(0, 1, count)
    quantiles = ranked[np.round(steps * (len(ranked) - 1)).astype(np.int64)]
    equal = ranked[0] + steps * (ranked[-1] - ranked[0])
    return [quantiles, equal, (quantiles + equal) / 2]


def _best_runs(ranked: Reals, count: int) -> Reals:
    """The means of the `count` runs of bins with the least sum of squared distances."""
    bounds = _bins(ranked)
    size, total, squares = (
        np.concatenate([[0.0], np.cumsum(part)])[bounds]
        for part in (np.ones(len(ranked)), ranked - ranked.mean(), (ranked - ranked.mean()) ** 2)
    )
    # cost[a, b] of the run from bound a to bound b, each [bounds].
    with np.errstate(divide="ignore", invalid="ignore"):
        means = np.subtract.outer(total, total) / np.subtract.outer(size, size)
        cost = (np.subtract.outer(squares, squares) - means * np.subtract.outer(total, total)).T
    cost[np.tril_indices(len(bounds))] = np.inf
    best, chosen = cost[0], []
    for _ in range(count - 1):
        ways = best[:, None] + cost
        chosen.append(ways.argmin(0))
        best = ways.min(0)
    cuts = [len(bounds) - 1]
    for earlier in reversed(chosen):
        cuts.append(int(earlier[cuts[-1]]))
    cuts = [0, *reversed(cuts)]
    return np.diff(total[cuts]) / np.diff(size[cuts]) + ranked.mean()


def _bins(ranked: Reals) -> Indices:
    """The bounds of at most 1,024 bins: a half of equal size, a half of equal width, so that
    neither the many weights nor the few large ones are lumped together."""
    if len(ranked) <= _MOST_BINS:
        return np.arange(len(ranked) + 1)
    half = _MOST_BINS // 2
    size = np.linspace(0, len(ranked), half).astype(np.int64)
    width = np.searchsorted(ranked, np.linspace(ranked[0], ranked[-1], half))
    return np.unique(np.concatenate([size, width]))


def _lloyd(ranked: Reals, sums: Reals, means: Reals, centre: float) -> tuple[Reals, float]:
    """(means, Σ of size · (mean − centre)²): what the squared distances are smaller by."""
    previous = None
    for _ in range(_ROUNDS):
        cuts = np.searchsorted(ranked, _between(means), side="right")
        bounds = np.unique(np.concatenate([[0], cuts, [len(ranked)]]))
        if previous is not None and np.array_equal(bounds, previous):
            break
        previous = bounds
        sizes = np.diff(bounds)
        means = np.diff(sums[bounds]) / sizes + centre
    assert previous is not None
    return means, float((np.diff(previous) * (means - centre) ** 2).sum())


def _between(means: Reals) -> Reals:
    return (means[1:] + means[:-1]) / 2


def _alive(values: Tensor, live: Tensor) -> Tensor:
    """`values` without a 0, which a mean may be: its weights would die of being shared."""
    smallest = live[live.abs().argmin()]
    return torch.where(values == 0, smallest, values)
