"""The parts of connection tensors that this process holds, with their state, as flat views.

A whole tensor is one `Piece`; under ZeRO and FSDP2 a rank holds some stretch of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from sclcore.layout.geometry import Geometry


@dataclass(eq=False)
class Piece:
    """A stretch of one connection tensor with its state: 1-D tensors of `length`, sharing memory.

    `param` receives the effective weight. Where the parameter's own memory cannot be seen flat,
    `param` is a buffer and `target` the tensor it is copied to afterwards.
    """

    tensor: Geometry
    index: int
    start: int
    param: Tensor
    weight: Tensor
    mask: Tensor
    mask_momentum: Tensor
    target: Tensor | None = None
    momentum: Tensor | None = None
    exp_avg: Tensor | None = None
    exp_avg_sq: Tensor | None = None
    _features: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def length(self) -> int:
        return self.weight.numel()

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def first_run(self) -> int:
        return self.start // self.tensor.run

    @property
    def runs(self) -> int:
        """Runs of which this piece holds at least a part."""
        return -(-self.end // self.tensor.run) - self.first_run if self.length else 0

    @property
    def features(self) -> int:
        """Features for which sums are kept: those of the runs, or all where runs recur."""
        return self.tensor.features if self.tensor.transposed_groups and self.length else self.runs

    @property
    def units(self) -> int:
        """Mask variables that it holds at least a part of; a unit is an element or more."""
        return (
            -(-self.end // self.tensor.unit) - self.start // self.tensor.unit if self.length else 0
        )

    def first_of_units(self) -> Tensor:
        """The first element that this piece has of each of its units [units], on the CPU."""
        unit = self.tensor.unit
        numbers = torch.arange(self.units) + self.start // unit
        return (numbers * unit - self.start).clamp_(min=0)

    def local_feature(self, number: int) -> int | None:
        """The place of feature `number` of the tensor among `features`; None if it is not there."""
        if self.tensor.transposed_groups:
            return number if self.length else None
        local = number - self.first_run
        return local if 0 <= local < self.runs else None

    def local_unit(self, number: int) -> int | None:
        local = number - self.start // self.tensor.unit
        return local if 0 <= local < self.units else None

    def touches(self, block: int) -> bool:
        """Whether any element of N:M block `block` is in this piece."""
        size = self.tensor.block
        return self.start < (block + 1) * size and block * size < self.end

    def stretches(self, values: Tensor, size: int) -> Tensor:
        """`values` [length] as rows of `size` [n, size]; zeros stand for what other ranks hold."""
        head = self.start % size
        tail = -self.end % size
        if head or tail:
            values = pad(values, (head, tail))
        return values.view(-1, size)

    def spread(self, rows: Tensor, size: int) -> Tensor:
        """One number per stretch of `size` [n] → one per element [length]."""
        head = self.start % size
        return rows.repeat_interleave(size)[head : head + self.length]

    def by_feature(self, per_run: Tensor) -> Tensor:
        """Sums per run [runs] → sums per feature [features].

        Where runs recur they are added by a sum over a dimension: index_add_ has no fixed order on
        a GPU, and ranks must come to the same bits.
        """
        groups = self.tensor.transposed_groups
        if not groups or not self.length:
            return per_run
        total = self.tensor.numel // self.tensor.run
        whole = pad(per_run, (self.first_run, total - self.first_run - self.runs))
        return whole.view(groups, -1, self.tensor.shape[1]).sum(1).view(-1)

    def by_run(self, per_feature: Tensor) -> Tensor:
        """One number per feature [features] → one per run [runs]."""
        features = self.feature_of_run()
        return per_feature if features is None else per_feature[features]

    def feature_of_run(self) -> Tensor | None:
        """The feature of each run of this piece [runs], where runs recur."""
        if self._features is None and self.tensor.feature_of_run is not None:
            mine = self.tensor.feature_of_run[self.first_run : self.first_run + self.runs]
            self._features = mine.to(self.weight.device)
        return self._features


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor as a 1-D view in the order its memory has."""
    return tensor.permute(_order(tensor)).view(-1)


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements lie side by side, in whatever order."""
    return tensor.permute(_order(tensor)).is_contiguous()


def keeps_features_together(tensor: Tensor) -> bool:
    """Whether the first dimension is the outermost in memory (channels_last has it so)."""
    order = [d for d in _order(tensor) if tensor.shape[d] > 1]
    return not order or order[0] == 0 or tensor.shape[0] == 1


def _order(tensor: Tensor) -> list[int]:
    strides = tensor.stride()
    return sorted(range(tensor.ndim), key=lambda d: (-strides[d] if tensor.shape[d] > 1 else 0, d))
