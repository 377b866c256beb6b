"""How the flattened elements of a connection tensor form features, mask variables, N:M blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sclcore.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

GRANULARITIES = ("weight", "kernel", "feature")


@dataclass(frozen=True)
class Geometry:
    """The tensor `name` of `shape`, seen as one row of elements in standard (row-major) order.

    A *run* is the longest stretch of neighbours that belong to one output feature: a row of a
    Linear, a filter of a Conv, a kernel of a ConvTranspose (whose features come back in every input
    channel). A *unit* is a stretch of elements that live or die together: the granularity of the
    masks; units never cross runs. With `n_m = (N, M)`, of every M neighbours at most N are live.
    """

    name: str
    shape: tuple[int, ...]
    transposed_groups: int = 0
    unit: int = 1
    n_m: tuple[int, int] | None = None

    @functools.cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @functools.cached_property
    def features(self) -> int:
        """Number of output features."""
        if self.transposed_groups:
            return self.transposed_groups * self.shape[1]
        return self.shape[0] if self.shape else 1

    @functools.cached_property
    def run(self) -> int:
        """Elements in a run."""
        if self.transposed_groups:
            return math.prod(self.shape[2:])
        return math.prod(self.shape[1:])

    @functools.cached_property
    def feature_of_run(self) -> Tensor | None:
        """The feature of each run [numel / run]; None where the runs are the features, in order."""
        if not self.transposed_groups:
            return None
        per_group = self.shape[1]
        runs = torch.arange(self.shape[0] * per_group)
        group = runs // per_group // (self.shape[0] // self.transposed_groups)
        return group * per_group + runs % per_group

    def feature_of_unit(self, number: int) -> int:
        run = number * self.unit // self.run
        return run if self.feature_of_run is None else int(self.feature_of_run[run])

    @functools.cached_property
    def variables_per_feature(self) -> int:
        return self.numel // self.features // self.unit

    @property
    def block(self) -> int:
        """Elements whose masks cannot be decided apart."""
        return self.n_m[1] if self.n_m else self.unit


def geometry_of(group: dict[str, Any], index: int, shape: Sequence[int]) -> Geometry:
    """The geometry of tensor `index` of a parameter group of connections.

    Raises ValueError where the tensor cannot have the granularity or the N:M the group asks for.
    """
    name, shape = group["names"][index], tuple(shape)
    granularity, n_m = group["granularity"][index], group["n_m"][index]
    plain = Geometry(name, shape, group["transposed_groups"][index])
    if granularity not in GRANULARITIES:
        known = ", ".join(GRANULARITIES)
        raise ValueError(f"unknown granularity {granularity!r} for {name}: choose one of {known}")
    if granularity == "feature" and plain.transposed_groups:
        raise ValueError(
            f"{name} belongs to a ConvTranspose or Conv1D, whose features cannot be masked as "
            "wholes: use the granularity kernel or weight"
        )
    unit = {
        "weight": 1,
        "kernel": math.prod(shape[2:]),
        "feature": plain.run,
    }[granularity]
    if n_m is not None:
        check_n_m(plain, granularity, n_m)
    return Geometry(name, shape, plain.transposed_groups, unit, n_m)


def parse_n_m(text: str) -> tuple[int, int]:
    """`"2:4"` → (2, 4); ValueError where it is no such pair."""
    try:
        n, m = map(int, text.split(":"))
    except ValueError:
        n, m = 0, 0
    if not 0 < n < m:
        raise ValueError(f"N:M must be two numbers with 0 < N < M, such as 2:4, not {text!r}")
    return n, m


def check_n_m(tensor: Geometry, granularity: str, n_m: tuple[int, int]) -> None:
    """ValueError where the masks of a tensor cannot be N:M."""
    n, m = n_m
    if granularity != "weight":
        raise ValueError(f"{tensor.name}: {n}:{m} needs the granularity weight, not {granularity}")
    if tensor.transposed_groups:
        raise ValueError(
            f"{tensor.name} belongs to a ConvTranspose or Conv1D, which cannot be {n}:{m}"
        )
    if tensor.run % m:
        raise ValueError(
            f"{tensor.name} has {tensor.run} input connections per feature, which {m} does not "
            f"divide: leave it out of n_m or exclude it, or choose another N:M"
        )
