"""Manifests: reading, refusing, and the checks against the files."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from data.errors import DataError
from data.files import atomic_file
from data.shards.manifest import (
    ImageStats,
    load_manifest,
    verify_checksums,
    verify_shards,
    write_manifest,
)


@pytest.fixture
def folder(packed_digits: Path, tmp_path: Path) -> Path:
    return shutil.copytree(packed_digits / "train", tmp_path / "train")


def test_roundtrip_keeps_everything(folder: Path, tmp_path: Path) -> None:
    manifest = load_manifest(folder)
    (tmp_path / "copy").mkdir()
    write_manifest(tmp_path / "copy", manifest)
    assert load_manifest(tmp_path / "copy") == manifest
    assert (manifest.samples, manifest.dataset, manifest.split) == (1437, "digits", "train")
    assert manifest.classes == [str(digit) for digit in range(10)]


def test_fingerprint_changes_with_the_data_only(folder: Path) -> None:
    manifest = load_manifest(folder)
    assert manifest.fingerprint() == load_manifest(folder).fingerprint()
    other = manifest.model_copy(update={"index_sha256": "0" * 64})
    assert other.fingerprint() != manifest.fingerprint()


def test_names_of_classes_are_optional_and_leave_old_fingerprints_alone(folder: Path) -> None:
    manifest = load_manifest(folder)
    stored = json.loads((folder / "manifest.json").read_text())
    assert "class_names" not in stored
    canonical = json.dumps(stored, sort_keys=True, separators=(",", ":")).encode()
    assert manifest.fingerprint() == hashlib.sha256(canonical).hexdigest()
    assert manifest.names == manifest.classes
    named = manifest.model_copy(update={"class_names": [f"é{k}" for k in range(10)]})
    write_manifest(folder, named)
    assert load_manifest(folder) == named
    assert load_manifest(folder).names[1] == "é1"
    assert named.fingerprint() != manifest.fingerprint()
    (folder / "manifest.json").write_text(json.dumps(stored | {"class_names": ["one"]}))
    with pytest.raises(DataError, match="class_names needs 10 names, one per class"):
        load_manifest(folder)


def test_missing_folder_and_manifest_say_what_to_run(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder .*nowhere; pack .*`scl pack`"):
        load_manifest(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty has no manifest.json; pack"):
        load_manifest(tmp_path / "empty")
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"index its shards with `scl pack index .*train`"):
        load_manifest(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"surprise": 1}, "surprise"),
        ({"samples": "many"}, "samples"),
        ({"format_version": 2}, "format_version"),
    ],
)
def test_invalid_manifest_names_the_field(folder: Path, change: dict, named: str) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=rf"not a valid manifest \({named}: "):
        load_manifest(folder)


def test_torn_manifest_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="not a valid manifest"):
        load_manifest(folder)


def test_stats_need_one_value_per_channel() -> None:
    with pytest.raises(ValueError, match="3 values each"):
        ImageStats(channels=3, mean=[0.5], std=[0.1, 0.1, 0.1], measured_on=1)


def test_verify_accepts_what_was_packed(folder: Path) -> None:
    manifest = load_manifest(folder)
    verify_shards(folder, manifest)
    assert verify_checksums(folder, manifest, progress=False) == []


def test_verify_names_the_first_problem_and_counts_the_rest(folder: Path) -> None:
    manifest = load_manifest(folder)
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001.tar is missing; "):
        verify_shards(folder, manifest)
    with (folder / "shard-000003.tar").open("r+b") as stream:
        stream.truncate(1000)
    (folder / "index.npz").unlink()
    with pytest.raises(DataError, match=r"shard-000001.tar is missing \(and 2 more\)"):
        verify_shards(folder, manifest)
    problems = verify_checksums(folder, manifest, progress=False)
    assert [problem.split()[0] for problem in problems] == [
        "shard-000001.tar",
        "shard-000003.tar",
        "index.npz",
    ]


def test_verify_finds_a_truncated_shard(folder: Path) -> None:
    with (folder / "shard-000003.tar").open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(DataError, match=r"shard-000003.tar has 1000 bytes instead of \d+"):
        verify_shards(folder, load_manifest(folder))


def test_verify_finds_a_wrong_sum_and_a_foreign_index(folder: Path, packed_digits: Path) -> None:
    manifest = load_manifest(folder)
    with pytest.raises(DataError, match="hold 1437 samples but it claims 1436"):
        verify_shards(folder, manifest.model_copy(update={"samples": 1436}))
    shutil.copy(packed_digits / "val" / "index.npz", folder / "index.npz")
    with pytest.raises(DataError, match=r"index.npz is not the one"):
        verify_shards(folder, manifest)


def test_checksums_find_what_sizes_do_not(folder: Path) -> None:
    manifest = load_manifest(folder)
    path = folder / "shard-000002.tar"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    verify_shards(folder, manifest)
    (problem,) = verify_checksums(folder, manifest, progress=False)
    assert problem.startswith("shard-000002.tar has changed")


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_bytes(b"old")

    def fail() -> None:
        with atomic_file(path) as stream:
            stream.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
