"""What ranks with parts of the same tensors tell each other: a small all-reduce before each step.

A boundary between ranks cuts at most one feature of a tensor whose features lie in a row, so the
message is some hundreds of numbers: sums of cut features, gradients of cut units (`granularity`),
mask variables of cut N:M blocks, and the connections of each tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sclcore.kernels.reference import LIVE, Cuts
from sclcore.layout.geometry import Geometry
from sclcore.layout.piece import Piece

# float32 adds whole numbers exactly below 2²⁴: a count travels as two digits to this base, which
# up to 4,096 ranks can add up.
_BASE = 4096


@dataclass(frozen=True)
class Completed:
    """What the message brought; counts are per tensor, in the order of the exchange's tensors."""

    sums: Tensor
    """Σ (∂L/∂m)² of each feature of each piece of this rank, one piece after the other."""
    layer_sums: Tensor
    """The same over each tensor [tensors]."""
    cuts: list[Cuts]
    """What each piece of this rank must know of its neighbours."""
    live: list[int]
    """Connections when the step began."""
    total: float
    """The sum of the callers' own numbers."""


class Exchange:
    """Knows which parts of which tensors every rank of `group` holds. Making one is collective.

    `pieces` are this rank's, at most one of each of `tensors`, with `Piece.index` the place in
    `tensors`; `like` has the device and precision of messages, which a rank without pieces would
    not know. Raises ValueError when the ranks' parts do not make up whole tensors.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        tensors: Sequence[Geometry],
        group: dist.ProcessGroup,
        like: Tensor,
    ) -> None:
        self._pieces, self._tensors, self.group, self._like = pieces, tensors, group, like
        mine = [(p.index, p.start, p.length) for p in pieces]
        everyone: list[list[tuple[int, int, int]]] = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(everyone, mine, group=group)
        spans: list[list[tuple[int, int]]] = [[] for _ in tensors]
        for index, start, length in itertools.chain.from_iterable(everyone):
            if length:
                spans[index].append((start, length))
        for tensor, parts in zip(tensors, spans, strict=True):
            _check_cover(tensor, sorted(parts))
        self._lay_out([sorted(start for start, _ in parts) for parts in spans])

    def _lay_out(self, starts: list[list[int]]) -> None:
        """Allot the message: [caller's number | layer sums | counts | cut features, units, blocks].

        Every rank comes to the same slots; the indices into its own sums differ.
        """
        self._slots = itertools.count(1 + 3 * len(self._tensors))
        both = [*zip(self._tensors, starts, strict=True)]
        features = [self._allot(_cut_features(tensor, at)) for tensor, at in both]
        units = [self._allot(_cut(at, tensor.unit)) for tensor, at in both]
        blocks = [
            self._allot(_cut(at, tensor.block), tensor.block) if tensor.n_m else {}
            for tensor, at in both
        ]
        self._size = next(self._slots)
        self._features, self._units, self._squares = _Pairs(), _Pairs(), _Pairs()
        self.cut_units: list[dict[int, int]] = []
        """Of each piece, the units that it has only parts of, and their slots."""
        self._piece_blocks: list[dict[int, int]] = []
        first_feature = first_unit = 0
        for piece in self._pieces:
            tensor, index = piece.tensor, piece.index
            for number, slot in features[index].items():
                self._features.add(first_feature, piece.local_feature(number), slot)
            for number, slot in units[index].items():
                feature = piece.local_feature(tensor.feature_of_unit(number))
                self._squares.add(first_feature, feature, slot)
                self._units.add(first_unit, piece.local_unit(number), slot)
            mine = units[index].items()
            self.cut_units.append({n: s for n, s in mine if piece.local_unit(n) is not None})
            self._piece_blocks.append({n: s for n, s in blocks[index].items() if piece.touches(n)})
            first_feature += piece.features
            first_unit += piece.units if tensor.unit > 1 else 0
        self._unit_owners = _Pairs()
        for index, slots in enumerate(units):
            for slot in slots.values():
                self._unit_owners.add(0, index, slot)
        self._has_blocks = any(blocks)

    def _allot(self, numbers: list[int], width: int = 1) -> dict[int, int]:
        slots = {}
        for number in numbers:
            slots[number] = next(self._slots)
            for _ in range(width - 1):
                next(self._slots)
        return slots

    def complete(
        self, sums: Tensor, layer_sums: Tensor, units: Tensor | None, counts: Tensor, own: Tensor
    ) -> Completed:
        """Send and receive the message. Collective.

        One piece after the other: `sums` of squares per feature, without those of cut units, and
        the gradient of each of the `units` where any tensor has coarser ones than weights. By
        tensor: `layer_sums`, of the same squares, and `counts` [tensors, 3], which are those of
        `update` for the pieces of this rank. `own` is a number.
        """
        tensors = len(self._tensors)
        message = sums.new_zeros(self._size)
        layers, counted = message[1 : 1 + tensors], message[1 + tensors : 1 + 3 * tensors]
        message[0] = own
        layers.copy_(layer_sums)
        live = counts[:, LIVE].to(sums.device)
        counted.copy_(torch.cat([live // _BASE, live % _BASE]))
        self._features.send(sums, message)
        if units is not None:
            self._units.send(units, message)
        self._send_blocks(message)
        dist.all_reduce(message, group=self.group)
        sums = self._features.receive(message, sums.clone())
        sums = self._squares.add_squares(message, sums)
        layers = self._unit_owners.add_squares(message, layers.clone())
        host = message[: 1 + 3 * tensors].double().nan_to_num().cpu()
        high, low = host[1 + tensors :].long().chunk(2)
        live = (high * _BASE + low).tolist()
        return Completed(sums, layers, self._cuts(message), live, float(message[0]))

    def new_blocks(self) -> list[Mapping[int, Tensor]]:
        """The cut N:M blocks of each piece as they are now. Collective where there are any."""
        if not self._has_blocks:
            return [{} for _ in self._pieces]
        message = self._like.new_zeros(self._size)
        self._send_blocks(message)
        dist.all_reduce(message, group=self.group)
        return [cuts.blocks for cuts in self._cuts(message)]

    def _send_blocks(self, message: Tensor) -> None:
        for piece, blocks in zip(self._pieces, self._piece_blocks, strict=True):
            for number, slot in blocks.items():
                first = number * piece.tensor.block
                low, high = max(first, piece.start), min(first + piece.tensor.block, piece.end)
                mine = piece.mask[low - piece.start : high - piece.start]
                message[slot + low - first : slot + high - first] = mine

    def _cuts(self, message: Tensor) -> list[Cuts]:
        cuts = []
        for piece, units, blocks in zip(
            self._pieces, self.cut_units, self._piece_blocks, strict=True
        ):
            size = piece.tensor.block
            cuts.append(
                Cuts(
                    units={n: message[slot] for n, slot in units.items()},
                    blocks={n: message[slot : slot + size] for n, slot in blocks.items()},
                )
            )
        return cuts


class _Pairs:
    """Places in a vector of this rank, and the slots of the message that belong to them."""

    def __init__(self) -> None:
        self._local: list[int] = []
        self._slot: list[int] = []
        self._indices: tuple[Tensor, Tensor] | None = None

    def add(self, first: int, local: int | None, slot: int) -> None:
        """`local` counts from `first`; None: this rank has no part of it."""
        if local is not None:
            self._local.append(first + local)
            self._slot.append(slot)

    def send(self, values: Tensor, message: Tensor) -> None:
        local, slot = self._on(message.device)
        message[slot] = values[local]

    def receive(self, message: Tensor, values: Tensor) -> Tensor:
        local, slot = self._on(message.device)
        values[local] = message[slot]
        return values

    def add_squares(self, message: Tensor, values: Tensor) -> Tensor:
        local, slot = self._on(message.device)
        squares = message[slot].square()
        # Ranks must add in the same order; on a GPU index_add_ takes any, on a CPU index_put_ does.
        if values.is_cuda:
            return values.index_put_((local,), squares, accumulate=True)
        return values.index_add_(0, local, squares)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._indices is None or self._indices[0].device != device:
            self._indices = (
                torch.tensor(self._local, dtype=torch.int64, device=device),
                torch.tensor(self._slot, dtype=torch.int64, device=device),
            )
        return self._indices


def _cut(starts: Sequence[int], size: int) -> list[int]:
    """The stretches of `size` that have a boundary inside them, by number."""
    return sorted({start // size for start in starts if start % size})


def _cut_features(tensor: Geometry, starts: Sequence[int]) -> list[int]:
    if tensor.transposed_groups:  # each feature comes back in every input channel
        return list(range(tensor.features)) if len(starts) > 1 else []
    return _cut(starts, tensor.run)


def _check_cover(tensor: Geometry, parts: Sequence[tuple[int, int]]) -> None:
    expected = 0
    for start, length in parts:
        if start != expected:
            raise ValueError(
                f"the ranks' shards of {tensor.name} do not make up the tensor: element {expected} "
                f"is {'missing' if start > expected else 'there twice'}"
            )
        expected += length
    if expected != tensor.numel:
        raise ValueError(
            f"the ranks' shards of {tensor.name} do not make up the tensor: they end at element "
            f"{expected} of {tensor.numel}"
        )
