"""Shards that are elsewhere, whole or in pieces, each of which comes into the cache for itself."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

from data.shards.pieces import Piece
from data.storage.ahead import Stretch
from data.storage.cache import ShardCache

# Writes a piece to a stream and verifies it; gives up once the second says so.
Fetch = Callable[[Piece, Callable[[], bool], BinaryIO], None]


class CachedShards:
    """Where the pieces of shards lie once they are here, and how they come. Pickles.

    `pieces` has those of each shard, in order.
    """

    def __init__(self, cache: ShardCache, pieces: Sequence[Sequence[Piece]], fetch: Fetch) -> None:
        self._cache = cache
        self._pieces = pieces
        self._firsts = [[piece.first for piece in of_shard] for of_shard in pieces]
        self._fetch = fetch

    def find(self, shard: int, offset: int) -> tuple[Path, int]:
        """Return the file that will hold a byte of a shard, and its first byte's place there."""
        piece = self._piece(shard, offset)
        return self._cache.path(piece), piece.first

    def bring(self, shard: int, offset: int) -> Callable[[], None] | None:
        """Fetch the piece that holds a byte of a shard, unless it is here."""
        piece = self._piece(shard, offset)
        return self._cache.bring(piece, partial(self._fetch, piece, _never))

    def pieces_in(self, stretches: Sequence[Stretch]) -> list[Stretch]:
        """Return the pieces that stretches of shards touch, each once, in their order."""
        found: dict[Stretch, None] = {}
        for shard, first, end in stretches:
            for piece in self._pieces[shard]:
                if piece.first < end and first < piece.end:
                    found[Stretch(shard, piece.first, piece.end)] = None
        return [*found]

    def prepare(
        self, stretch: Stretch, urgent: Callable[[], bool], stopped: Callable[[], bool]
    ) -> Callable[[], None] | None:
        """Have a piece here; see `Prepare`."""
        piece = self._piece(stretch.shard, stretch.first)
        return self._cache.bring(piece, partial(self._fetch, piece, stopped), urgent, stopped)

    def _piece(self, shard: int, offset: int) -> Piece:
        return self._pieces[shard][bisect_right(self._firsts[shard], offset) - 1]


def _never() -> bool:
    return False
