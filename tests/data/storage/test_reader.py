"""Reading at offsets: a bounded number of open files, none of them of a removed shard."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path

import pytest

from data.errors import DataError
from data.storage import reader as reader_module
from data.storage.reader import ShardReader, WholeShards


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{k}.tar" for k in range(5)]
    for k, path in enumerate(paths):
        path.write_bytes(bytes([k]) * 100)
    return paths


def open_files() -> set[str]:
    names = set()
    for entry in Path("/proc/self/fd").iterdir():
        # The one that lists the folder is gone by now.
        with contextlib.suppress(FileNotFoundError):
            names.add(str(entry.readlink()))
    return names


def test_reads_what_lies_at_an_offset(shards: list[Path]) -> None:
    reader = ShardReader(WholeShards(shards))
    assert reader.read(3, 90, 5) == b"\3" * 5
    assert reader.read(3, 90, 50) == b"\3" * 10
    again = pickle.loads(pickle.dumps(reader))
    assert again.read(1, 0, 1) == b"\1"


def test_open_files_are_bounded(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "MAX_OPEN", 2)
    reader = ShardReader(WholeShards(shards))
    for k in (0, 1, 0, 2, 3, 0):
        assert reader.read(k, 0, 1) == bytes([k])
        assert len(open_files() & {str(path) for path in shards}) <= 2
    reader.close()
    assert not open_files() & {str(path) for path in shards}


def test_removed_shards_do_not_stay_open(shards: list[Path]) -> None:
    """An open file keeps its room on the disk, which a cache has counted as free."""
    reader = ShardReader(WholeShards(shards))
    reader.read(0, 0, 1)
    reader.read(1, 0, 1)
    shards[0].unlink()
    # What is being read is not pulled away.
    assert reader.read(0, 0, 1) == b"\0"
    reader.read(2, 0, 1)
    held = {name for name in open_files() if str(shards[0]) in name}
    assert not held
    with pytest.raises(DataError, match=r"0.tar cannot be read \(No such file"):
        reader.read(0, 0, 1)
