"""Where each sample's image lies inside the tars: found by reading headers, kept beside them."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.files import atomic_file
from data.shards.scan import ShardRows

_COLUMNS = {"shard": np.int32, "offset": np.int64, "size": np.int32, "label": np.int32}
_TAR_BLOCK = 512


@dataclass(frozen=True)
class SampleIndex:
    """One row per sample in packed order; a sample's id is its row.

    `shard`, int32 [N], is the position of the tar in the manifest's list; `offset`, int64 [N], the
    first byte of the image inside the tar; `size`, int32 [N], the image's length in bytes; `label`
    is int32 [N].
    """

    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    @classmethod
    def from_rows(cls, shards: Sequence[ShardRows]) -> SampleIndex:
        """Join the rows of all shards, given in the manifest's order."""
        lengths = [len(rows.label) for rows in shards]
        return cls(
            shard=np.repeat(np.arange(len(shards), dtype=np.int32), lengths),
            offset=np.concatenate([rows.offset for rows in shards]),
            size=np.concatenate([rows.size for rows in shards]),
            label=np.concatenate([rows.label for rows in shards]),
        )

    def save(self, path: Path) -> None:
        """Write the index atomically; equal indices give equal bytes."""
        with atomic_file(path) as stream:
            np.savez(stream, shard=self.shard, offset=self.offset, size=self.size, label=self.label)

    @classmethod
    def load(cls, path: Path) -> SampleIndex:
        """Read an index.

        Raises DataError where the file is missing or is no index.
        """
        fix = f"rebuild it with `scl pack index {path.parent}`"
        try:
            with np.load(path, allow_pickle=False) as stored:
                columns = {name: stored[name].astype(kind) for name, kind in _COLUMNS.items()}
        except FileNotFoundError as error:
            raise DataError(f"there is no {path}; {fix}") from error
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is not a readable index ({error}); {fix}") from error
        if len({len(column) for column in columns.values()}) != 1:
            raise DataError(f"the columns of {path} differ in length; {fix}")
        return cls(**columns)


def key_at(path: Path, offset: int) -> str:
    """Return the key of the sample whose image starts at `offset`, from the tar header.

    Raises DataError where no tar header stands before `offset`.
    """
    with path.open("rb") as stream:
        stream.seek(offset - _TAR_BLOCK)
        block = stream.read(_TAR_BLOCK)
    try:
        name = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").name
    except tarfile.HeaderError as error:
        raise DataError(
            f"{path} has no tar header before byte {offset} ({error}); "
            "the index is not that of this shard: index or pack the folder again"
        ) from error
    # The key of a sample is its image's name up to the format.
    folder, slash, base = name.rpartition("/")
    return folder + slash + (base.rpartition(".")[0] or base)
