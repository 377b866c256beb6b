"""Writing files whole."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data import files
from data.errors import DataError
from data.files import atomic_file, explained, sha256_of


def test_atomic_write_replaces_whole_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "note"
    files.atomic_write(target, "one")
    files.atomic_write(target, b"two")
    assert target.read_bytes() == b"two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["note"]


def test_atomic_write_respects_the_umask(tmp_path: Path) -> None:
    target, plain = tmp_path / "note", tmp_path / "plain"
    files.atomic_write(target, "x")
    plain.write_text("x")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_failed_write_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "note"
    files.atomic_write(target, "old")

    def full_disk(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        files.atomic_write(target, "new")
    assert target.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["note"]


def test_data_is_synced_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "note"
    seen: list[tuple[str, bool]] = []
    real = os.fsync

    def recording(handle: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"
        seen.append((kind, target.exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", recording)
    files.atomic_write(target, "x")
    assert seen == [("file", False), ("folder", True)]


def _dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_only_what_the_dead_left_is_removed(tmp_path: Path) -> None:
    host = files._HOST
    dead, parent, me = _dead_pid(), os.getppid(), os.getpid()
    abandoned = [
        f".tmp-step-1-{host}-{dead}-0123abcd",
        # The pid is ours, the token is not: an earlier process of the same number.
        f".tmp-step-1-{host}-{me}-0123abcd",
        f".tmp-old-elsewhere-{dead}-0123abcd",
    ]
    alive = [
        files.temporary_beside(tmp_path / "step-1").name,
        f".tmp-step-1-{host}-{parent}-0123abcd",
        f".tmp-step-1-elsewhere-{dead}-0123abcd",
        ".tmp-of-somebody-else",
    ]
    for name in (*abandoned, *alive):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").touch()
    long_ago = time.time() - 2 * 24 * 3600
    for path in (tmp_path / abandoned[2], tmp_path / abandoned[2] / "content"):
        os.utime(path, (long_ago, long_ago))

    assert sorted(files.remove_leftovers(tmp_path)) == sorted(abandoned)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(alive)


def test_sha256_of_a_known_content(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "abc") == expected


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_file(path) as stream:
        stream.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def _write_to_a_full_disk(_folder: Path) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        full.write(b"x")


@pytest.mark.parametrize(
    ("work", "sentence"),
    [
        (lambda folder: (folder / "file" / "below").mkdir(), r"/below .*\(Not a dir.*; a file is"),
        (lambda folder: (folder / "file").mkdir(), r"/file cannot be used \(File exists\); a file"),
        (lambda folder: folder.read_bytes(), r"cannot be used \(Is a directory\); a folder is"),
        (_write_to_a_full_disk, r"cannot be used \(No space left on device\); make room"),
    ],
)
def test_what_a_file_system_refuses_is_a_sentence(
    tmp_path: Path, work: Callable[[Path], None], sentence: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=sentence), explained(tmp_path):
        work(tmp_path)


def test_a_reader_of_our_output_that_has_gone_is_no_fault_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(BrokenPipeError), explained(tmp_path):
        raise BrokenPipeError


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with files.new_folder(target) as folder:
        (folder / "a").write_text("one")
        assert not target.exists()
    assert (target / "a").read_text() == "one"
    with pytest.raises(ValueError), files.new_folder(tmp_path / "failed") as folder:
        (folder / "a").write_text("half")
        raise ValueError
    assert [entry.name for entry in tmp_path.iterdir()] == ["made"]
