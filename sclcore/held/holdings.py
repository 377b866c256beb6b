"""What one process holds of the connections: pieces with their state, gradients, a message."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from sclcore.held.exchange import Exchange
from sclcore.kernels.kernel import is_plain
from sclcore.kernels.reference import COUNTS, FLIPS, LIVE, live
from sclcore.layout.geometry import Geometry, geometry_of
from sclcore.layout.local import Group, Source, State, find_pieces, gradient_of, memory_of
from sclcore.layout.piece import Piece, flat
from sclcore.optim.layerwise import share_of


class Holdings:
    """The connections of some parameter groups, as far as they are in this process.

    `tensors` are all tensors of the groups, `owners` and `places` the group of each and its index
    there; `pieces` is what is held of them (`Piece.index` is the place in `tensors`). `exchange`
    completes sums over ranks where tensors are sharded; it is None where they are whole. Making one
    of sharded groups is collective.
    """

    def __init__(
        self, groups: Sequence[Group], state: State, process_group: dist.ProcessGroup | None
    ) -> None:
        self._groups, self._state = list(groups), state
        self.tensors: list[Geometry] = []
        self.owners: list[Group] = []
        self.places: list[int] = []
        found: list[tuple[Piece, Source]] = []
        for group in groups:
            first = len(self.tensors)
            for place, shape in enumerate(group["shapes"]):
                self.tensors.append(geometry_of(group, place, shape))
                self.owners.append(group)
                self.places.append(place)
            found += find_pieces(group, self.tensors[first:], first, state)
        self.names = [tensor.name for tensor in self.tensors]
        self.pieces = [piece for piece, _ in found]
        self.sources = [source for _, source in found]
        self.params = [*dict.fromkeys(source.param for source in self.sources)]
        """The parameters that the pieces are parts of, each once."""
        self._memory = [*memory_of(self._groups, state)]
        self._known_places: dict[tuple[int, ...], Tensor] = {}
        batches: dict[tuple[int, float], list[int]] = {}
        for i, piece in enumerate(self.pieces):
            if is_plain(piece):
                group = self.owners[piece.index]
                share = share_of(group, self.places[piece.index])
                batches.setdefault((id(group), share), []).append(i)
        self.plain_batches = [*batches.values()]
        """The pieces that a fused step takes at once, all with the same settings."""
        # Not of the pieces: a rank may hold none.
        params = [param for group in groups for param in group["params"]]
        self.device = params[0].device
        self.dtype = functools.reduce(torch.promote_types, [p.dtype for p in params], torch.float32)
        ranks = _ranks(groups, process_group)
        self.exchange = Exchange(self.pieces, self.tensors, ranks, self.zeros(0)) if ranks else None
        self._describe_features()
        self.counts = torch.zeros(len(self.tensors), COUNTS, dtype=torch.int64, device=self.device)
        """What the last step counted, of this rank's pieces (`sclcore.kernels.reference`)."""
        self.moved: Sequence[int] = ()
        """The pieces whose masks the last step moved."""
        self.blocks: list[Mapping[int, Tensor]] = [{} for _ in self.pieces]
        """Of each piece, the N:M blocks that other ranks hold parts of, as they were last known."""
        self.count_live()

    def is_current(self, groups: Sequence[Group]) -> bool:
        """Whether the groups are the same ones and none of their memory has been replaced."""
        same = len(groups) == len(self._groups) and all(
            mine is other for mine, other in zip(self._groups, groups, strict=True)
        )
        return same and self._memory == [*memory_of(self._groups, self._state)]

    def gradients(self) -> dict[int, Tensor]:
        """G of each piece that has one, flat and in the precision of its state."""
        pairs = zip(self.pieces, self.sources, strict=True)
        found = {i: gradient_of(piece, source) for i, (piece, source) in enumerate(pairs)}
        return {i: grad for i, grad in found.items() if grad is not None}

    def zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=self.dtype, device=self.device)

    def new_blocks(self) -> list[Mapping[int, Tensor]]:
        """The N:M blocks of each piece that other ranks hold parts of, as they are now.

        Collective where tensors are sharded.
        """
        if self.exchange is not None:
            self.blocks = self.exchange.new_blocks()
        return self.blocks

    def cut_units(self, piece: int) -> Mapping[int, Any]:
        """The units of a piece that other ranks hold parts of, by number."""
        return self.exchange.cut_units[piece] if self.exchange else {}

    def note(self, counted: Mapping[int, Tensor], moved: Sequence[int]) -> None:
        """Keep what a step counted of each piece, and the pieces whose masks it moved."""
        self.moved = moved
        if len(counted) < len(self.pieces):
            # The others have not flipped in this step.
            self.counts[:, FLIPS:] = 0
        if counted:
            self.counts[self._places_of(tuple(counted))] = torch.stack([*counted.values()])

    def _places_of(self, pieces: tuple[int, ...]) -> Tensor:
        """The tensors of pieces, on the device; kept, since making it waits for the device."""
        if pieces not in self._known_places:
            places = [self.pieces[i].index for i in pieces]
            self._known_places[pieces] = torch.tensor(places, device=self.device)
        return self._known_places[pieces]

    def total_counts(self) -> list[int]:
        """Live connections of each tensor. Collective where tensors are sharded.

        A tensor that has no state yet is wholly live.
        """
        live_now = self.counts[:, LIVE].clone()
        if self.exchange is not None:
            dist.all_reduce(live_now, group=self.exchange.group)
            return live_now.tolist()
        known = {piece.index for piece in self.pieces}
        numbers = live_now.tolist()
        return [n if i in known else self.tensors[i].numel for i, n in enumerate(numbers)]

    def gather(
        self, parts: Sequence[Tensor], dtype: torch.dtype, missing: int
    ) -> dict[str, Tensor]:
        """A value per element of each piece → whole tensors by name; `missing` without state.

        Collective where tensors are sharded.
        """
        by_index = {p.index: (p, part) for p, part in zip(self.pieces, parts, strict=True)}
        gathered = {}
        for index, tensor in enumerate(self.tensors):
            piece, part = by_index.get(index, (None, None))
            if self.exchange is not None:
                # Neither booleans nor bfloat16 add up everywhere.
                carrier = torch.uint8 if dtype == torch.bool else self.dtype
                values = torch.zeros(tensor.numel, dtype=carrier, device=self.device)
                if piece is not None and part is not None:
                    values[piece.start : piece.end] = part
                dist.all_reduce(values, group=self.exchange.group)
                gathered[tensor.name] = values.view(tensor.shape).to(dtype)
                continue
            param = self.owners[index]["params"][self.places[index]]
            whole = torch.full_like(param, missing, dtype=dtype, requires_grad=False)
            if piece is not None and part is not None:
                whole = whole.contiguous() if piece.target is not None else whole
                flat(whole).copy_(part)
            gathered[tensor.name] = whole
        return gathered

    def sample(self, parts: Sequence[Tensor], stride: int) -> Tensor:
        """Every `stride`-th element of each tensor, from a value per element of each piece.

        Tensors without state are left out. Collective where tensors are sharded.
        """
        if self.exchange is None:
            return torch.cat([self.zeros(0), *(part[::stride] for part in parts)])
        sizes = [-(-tensor.numel // stride) for tensor in self.tensors]
        message = self.zeros(sum(sizes))
        samples = message.split(sizes)
        for piece, part in zip(self.pieces, parts, strict=True):
            mine = part[-piece.start % stride :: stride]
            first = -(-piece.start // stride)
            samples[piece.index][first : first + len(mine)] = mine
        dist.all_reduce(message, group=self.exchange.group)
        return message

    def count_live(self) -> None:
        """Count live connections anew. Collective where tensors are sharded."""
        for piece, neighbours in zip(self.pieces, self.new_blocks(), strict=True):
            self.counts[piece.index, LIVE] = live(piece, neighbours).sum()

    def _describe_features(self) -> None:
        """Vectors over the features of all pieces: what normalisation needs of each."""
        self.feature_counts = [p.features for p in self.pieces]
        spread = torch.tensor(self.feature_counts, dtype=torch.int64)

        def per_feature(values: list[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).repeat_interleave(spread).to(self.device)

        tensors = [p.tensor for p in self.pieces]
        every = [self.scope(i) for i in range(len(self.tensors))]
        scopes = [every[p.index] for p in self.pieces]
        self.tensor_of_feature = per_feature([p.index for p in self.pieces], torch.int64)
        self.variables = per_feature([t.variables_per_feature for t in tensors], self.dtype)
        self.unnormalised = per_feature([s == "none" for s in scopes], torch.bool)
        self.pooled = per_feature([s in ("layer", "network") for s in scopes], torch.bool)
        """Whether a feature is divided by what it shares with others: `pools`, not its own sum."""
        self._any_pooled = not {"layer", "network"}.isdisjoint(every)
        self._of_network = torch.tensor([s == "network" for s in every]).to(self.device)
        sizes = [t.numel // t.unit for t in self.tensors]
        of_network = sum(n for n, s in zip(sizes, every, strict=True) if s == "network")
        # Of the features of all tensors, on this rank or not.
        mean = sum(sizes) / sum(t.features for t in self.tensors)
        whole = {"network": of_network, "feature_norm": mean}
        counts = [
            whole.get(s, sizes[p.index] if s == "layer" else p.tensor.variables_per_feature)
            for p, s in zip(self.pieces, scopes, strict=True)
        ]
        self.divided_by = per_feature(counts, self.dtype)
        """What the sum of squares of each feature's divisor is divided by, to be a mean square."""

    def pools(self, layer_sums: Tensor) -> Tensor:
        """Σ over what each tensor shares its divisor with [tensors], from the sum of each.

        Itself, or all tensors that are normalised by their network.
        """
        whole = layer_sums.masked_fill(~self._of_network, 0.0).sum()
        return torch.where(self._of_network, whole, layer_sums)

    def layer_sums(self, sums: Tensor) -> Tensor:
        """Σ over the features of each piece → of each tensor [tensors]; 0 where nobody needs it.

        One sum after the other: a GPU's atomics would add in another order each time, and ranks
        with whole tensors must come to the same masks.
        """
        totals = self.zeros(len(self.tensors))
        if self._any_pooled:
            for piece, part in zip(self.pieces, sums.split(self.feature_counts), strict=True):
                totals[piece.index] = part.sum()
        return totals

    def scope(self, index: int) -> str:
        """What the mask gradients of a tensor are normalised over (`SCL`, `normalize`).

        A feature with a single mask variable is normalised over its layer: divided by its own
        magnitude, nothing but the sign would be left of its gradient.
        """
        normalize = self.owners[index]["normalize"]
        alone = self.tensors[index].variables_per_feature == 1
        return "layer" if normalize in ("feature", "feature_norm") and alone else normalize


def _ranks(
    groups: Sequence[Group], process_group: dist.ProcessGroup | None
) -> dist.ProcessGroup | None:
    """The ranks that share the tensors; None where every tensor is whole."""
    if any("shards" in group for group in groups):
        if process_group is None:
            raise RuntimeError("a copy of an optimizer with sharded state needs set_shards anew")
        return process_group
    meshes = [p.device_mesh for g in groups for p in g["params"] if isinstance(p, DTensor)]
    return meshes[0].get_group() if meshes else None
