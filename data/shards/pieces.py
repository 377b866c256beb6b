"""Where a shard may be cut, so that a machine fetches no more of it than the part that it reads.

A file beside the index says it, with the SHA-256 of each piece: what comes of a shard can then be
verified without the rest. Neither manifest nor index knows of it; a set without it is as good.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.files import atomic_file, explained
from data.shards.manifest import ShardInfo

PIECES_NAME = "pieces.npz"
# Pieces are at least so large: smaller ones cost a store more requests and a cache more files.
PIECE_BYTES = 32 << 20
# Every piece in use is an open file of a rank, at most two windows of 65,536 samples at a time.
LEAST_SAMPLES = 256
_TAR_BLOCK = 512
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Piece:
    """`bytes` of the shard `name` from byte `first` on; `is_whole` where that is all of it."""

    name: str
    first: int
    bytes: int
    sha256: str
    is_whole: bool

    @property
    def end(self) -> int:
        """The byte after its last."""
        return self.first + self.bytes


@dataclass(frozen=True)
class ShardPieces:
    """The pieces of one shard: the byte after each, and its SHA-256; and that of the shard."""

    ends: list[int]
    sha256: list[str]
    shard_sha256: str


def may_be_cut(shard: ShardInfo) -> bool:
    """Whether the shard is large enough for several pieces."""
    return _count(shard.bytes, shard.samples) > 1


def cuts(offsets: np.ndarray, size: int) -> list[int]:
    """Return the byte after each piece of a shard of `size` bytes with images at `offsets`.

    Cut is before an image's tar header, so that every image lies in one piece.
    """
    places = np.unique(offsets)
    count = _count(size, len(places))
    firsts = places[len(places) * np.arange(1, count) // count] - _TAR_BLOCK
    return [*firsts.tolist(), size]


def _count(size: int, samples: int) -> int:
    return max(1, min(size // PIECE_BYTES, samples // LEAST_SAMPLES))


def read_pieces(path: Path, ends: Sequence[int]) -> ShardPieces:
    """Hash a shard and its pieces, in one pass. Raises DataError where it cannot be read."""
    whole, digests, first = hashlib.sha256(), [], 0
    with explained(path), path.open("rb") as stream:
        for end in ends:
            digest, left = hashlib.sha256(), end - first
            while left and (chunk := stream.read(min(_CHUNK, left))):
                digest.update(chunk)
                whole.update(chunk)
                left -= len(chunk)
            digests.append(digest.hexdigest())
            first = end
        while chunk := stream.read(_CHUNK):
            whole.update(chunk)
    return ShardPieces([*ends], digests, whole.hexdigest())


def whole(shards: Sequence[ShardInfo]) -> list[list[Piece]]:
    """Each shard as one piece."""
    return [[Piece(shard.name, 0, shard.bytes, shard.sha256, True)] for shard in shards]


def write_pieces(folder: Path, shards: Sequence[ShardPieces]) -> None:
    """Write the file of a split atomically, or remove it where no shard has several pieces."""
    path = folder / PIECES_NAME
    if all(len(shard.ends) == 1 for shard in shards):
        path.unlink(missing_ok=True)
        return
    with atomic_file(path) as stream:
        np.savez(
            stream,
            shard_sha256=_as_bytes([shard.shard_sha256 for shard in shards]),
            count=np.array([len(shard.ends) for shard in shards], np.int32),
            end=np.array([end for shard in shards for end in shard.ends], np.int64),
            sha256=_as_bytes([digest for shard in shards for digest in shard.sha256]),
        )


def parse_pieces(content: bytes, name: str) -> list[ShardPieces]:
    """Return what a file of pieces says; raises DataError, naming it, where it is none."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            shards, counts = _as_hex(stored["shard_sha256"]), stored["count"].astype(np.int64)
            ends, digests = stored["end"].astype(np.int64).tolist(), _as_hex(stored["sha256"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{name} is no list of pieces ({error}); {_FIX}") from error
    if len(counts) != len(shards) or not counts.sum() == len(ends) == len(digests):
        raise DataError(f"the columns of {name} differ in length; {_FIX}")
    last = np.cumsum(counts).tolist()
    spans = [slice(end - n, end) for n, end in zip(counts.tolist(), last, strict=True)]
    return [ShardPieces(ends[s], digests[s], of) for s, of in zip(spans, shards, strict=True)]


_FIX = "write it anew with `scl pack pieces`"


def pieces_of(shards: Sequence[ShardInfo], cut: Sequence[ShardPieces]) -> list[list[Piece]] | None:
    """Return the pieces of each shard of a manifest; None where they are of other shards."""
    if [shard.sha256 for shard in shards] != [of.shard_sha256 for of in cut]:
        return None
    return [_pieces(shard, of) for shard, of in zip(shards, cut, strict=True)]


def _pieces(shard: ShardInfo, cut: ShardPieces) -> list[Piece]:
    if len(cut.ends) == 1:
        return whole([shard])[0]
    firsts = [0, *cut.ends[:-1]]
    return [
        Piece(shard.name, first, end - first, digest, False)
        for first, end, digest in zip(firsts, cut.ends, cut.sha256, strict=True)
    ]


def _as_bytes(digests: Sequence[str]) -> np.ndarray:
    return np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(len(digests), -1)


def _as_hex(rows: np.ndarray) -> list[str]:
    return [row.tobytes().hex() for row in np.ascontiguousarray(rows, np.uint8)]
