"""A network as the native runtime runs it: maps and vectors, and the steps between them."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float32]
Pair = tuple[int, int]
Shape = tuple[int, int, int]
"""Channels, height, width; a vector has height and width 1."""


class Kind(enum.IntEnum):
    """What a step does; the numbers are those of c/internal.h."""

    CONV = 1
    LINEAR = 2
    ADD = 3
    SCALE = 4
    MAXPOOL = 5
    MEAN = 6
    ACTIVATE = 7
    NORMALISE = 8
    EMBED = 10
    ATTEND = 11
    LAYERNORM = 12
    SELECT = 13


class Activation(enum.IntEnum):
    """The function that a step's results go through last; CLIP is min(max(x, low), high)."""

    CLIP = 0
    SILU = 1
    SIGMOID = 2
    TANH = 3
    HARDSWISH = 4
    HARDSIGMOID = 5
    GELU = 6


@dataclass
class Step:
    """One operation on tensors, which are named by their numbers.

    `second` is what a convolution adds before its activation, or the other operand. `weight` is
    [out, in / groups, height, width] of a convolution, [out, in] of a Linear layer, whose input is
    a map in row-major order. `before` is the padding above and to the left; below and to the
    right, padding is what the output's size needs. `groups` are those of a convolution, or what
    channels are normalised in; then `low` is epsilon.

    Tokens are a map of one row. EMBED makes them of a map's pixels: behind as many constant ones as
    `before` says, and with `bias` [channels, tokens] added. ATTEND has queries, keys and values as
    channels of its source, `groups` heads and the scale `low`. SELECT gives token `before`.
    """

    kind: Kind
    source: int
    out: int
    second: int = -1
    activation: Activation = Activation.CLIP
    low: float = -math.inf
    high: float = math.inf
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    before: Pair = (0, 0)
    groups: int = 1
    weight: Weights | None = None
    bias: Weights | None = None
    name: str = ""

    @property
    def plain(self) -> bool:
        """Whether nothing is done to its results yet."""
        return (self.activation, self.low, self.high) == (Activation.CLIP, -math.inf, math.inf)


@dataclass
class Network:
    """The shapes of all tensors, the steps in order, and which tensors go in and come out.

    `out_shape` is what the model makes of the latter: a map may come out flattened.
    """

    tensors: list[Shape] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    source: int = 0
    out: int = 0
    out_shape: tuple[int, ...] = ()

    def new(self, shape: Shape) -> int:
        self.tensors.append(shape)
        return len(self.tensors) - 1
