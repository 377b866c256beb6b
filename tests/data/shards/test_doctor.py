"""`scl doctor`: it finds every kind of damage, names it, and lets what is sound pass."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.files import sha256_of
from data.packing.adopt import index_shards
from data.shards import doctor
from data.shards.class_order import is_sorted_by_class
from data.shards.doctor import examine
from data.shards.index import SampleIndex
from data.shards.manifest import load_manifest, write_manifest
from launcher import cli
from tests.data.conftest import MakeTar, image_bytes


@pytest.fixture
def digits(packed_digits: Path, tmp_path: Path) -> Path:
    return shutil.copytree(packed_digits, tmp_path / "digits")


def problems(folder: Path, **how) -> list[str]:
    found = examine(folder, progress=False, **how).problems
    return [f"{p.file.name} {p.key}: {p.reason}" for p in found]


def test_sound_shards_pass(packed_digits: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["doctor", str(packed_digits)]) == 0
    said = capsys.readouterr().out
    assert "train: sound; 1,437 samples in 17 shards" in said
    assert "val: sound; 360 samples in 6 shards" in said
    assert cli.main(["doctor", "--quick", str(packed_digits / "val")]) == 0
    assert "sound (sizes and index only)" in capsys.readouterr().out


def flip_bytes(path: Path, offset: int, count: int = 8) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        content = stream.read(count)
        stream.seek(offset)
        stream.write(bytes(b ^ 255 for b in content))


def damage_an_image(val: Path) -> None:
    index = SampleIndex.load(val / "index.npz")
    flip_bytes(val / "shard-000000.tar", int(index.offset[3]))


def other_manifest(val: Path, **changes) -> None:
    write_manifest(val, load_manifest(val).model_copy(update=changes))


def relabel(val: Path) -> None:
    """As many labels as before, but of fewer classes in the manifest."""
    other_manifest(val, classes=[str(label) for label in range(9)])


def other_index(val: Path) -> None:
    index = SampleIndex.load(val / "index.npz")
    offset = index.offset.copy()
    offset[0] += 512
    SampleIndex(index.shard, offset, index.size, index.label).save(val / "index.npz")


DAMAGES: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    "missing": (lambda val: (val / "shard-000002.tar").unlink(), "2.tar : it is missing", True),
    "truncated": (
        lambda val: (val / "shard-000001.tar").write_bytes(
            (val / "shard-000001.tar").read_bytes()[:40_000]
        ),
        "1.tar : it has 40000 bytes instead of",
        True,
    ),
    "changed": (
        lambda val: flip_bytes(val / "shard-000001.tar", 0, 4),
        "1.tar : it has changed since it was packed",
        False,
    ),
    "image": (damage_an_image, "0.tar 00000003: UnidentifiedImageError", False),
    "label": (relabel, ": its label is 9, but there are 9 classes", False),
    "index": (other_index, "index.npz : it is not the one the manifest was written with", True),
    "no index": (lambda val: (val / "index.npz").unlink(), "index.npz : there is no ", True),
    "counts": (
        lambda val: other_manifest(val, samples=361),
        "manifest.json : its shards have 360 samples, but it claims 361",
        True,
    ),
    "stranger": (
        lambda val: shutil.copy(val / "shard-000000.tar", val / "other.tar"),
        "other.tar : the manifest does not list it",
        True,
    ),
    "no manifest": (
        lambda val: (val / "manifest.json").unlink(),
        "manifest.json : .* has no manifest.json; index its shards with `scl pack index",
        True,
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_found_and_named(
    name: str, digits: Path, capsys: pytest.CaptureFixture
) -> None:
    damage, sentence, quickly = DAMAGES[name]
    damage(digits / "val")
    found = problems(digits / "val")
    assert any(re.search(sentence, problem) for problem in found), found
    assert bool(problems(digits / "val", quick=True)) == quickly
    assert cli.main(["doctor", "--workers", "1", str(digits)]) == 1
    said = capsys.readouterr().out
    assert re.search(sentence.partition(" : ")[2] or sentence, said)
    assert "train: sound" in said


def test_a_damaged_image_is_the_only_one_listed(digits: Path) -> None:
    damage_an_image(digits / "val")
    found = problems(digits / "val")
    assert len(found) == 2  # the shard's checksum, and the sample
    assert "00000003" in found[1]


def test_processes_find_what_one_finds(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage_an_image(digits / "val")
    (digits / "val" / "shard-000004.tar").unlink()
    alone = problems(digits / "val", workers=1)
    monkeypatch.setattr(doctor, "_WORTH_PROCESSES", 0)
    assert problems(digits / "val", workers=2) == alone
    assert len(alone) == 3


def test_index_that_points_elsewhere_is_found(digits: Path) -> None:
    """The manifest agrees with the index, but neither with the tars."""
    val = digits / "val"
    other_index(val)
    other_manifest(val, index_sha256=sha256_of(val / "index.npz"))
    assert problems(val) == ["shard-000000.tar : index.npz does not describe what it holds"]


def test_foreign_shards_are_checked_by_their_own_layout(tmp_path: Path, make_tar: MakeTar) -> None:
    folder = tmp_path / "foreign"
    members = [
        (f"{k:04d}.{kind}", image_bytes(k) if kind == "png" else json.dumps({"y": k}).encode())
        for k in range(3)
        for kind in ("png", "json")
    ]
    make_tar(folder / "a.tar", members)
    assert cli.main(["doctor", str(folder)]) == 1
    index_shards(folder, label_from="json:y", progress=False)
    assert cli.main(["doctor", str(folder)]) == 0


@pytest.mark.parametrize(
    "arguments", [[], ["--workers", "0", "."], ["{tmp}/nothing"], ["{tmp}"]], ids=str
)
def test_wrong_usage_is_2(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["doctor", *(a.format(tmp=tmp_path) for a in arguments)]) == 2
    assert "error: " in capsys.readouterr().err


def test_pieces_of_nothing_is_2_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["pack", "pieces", str(tmp_path / "nothing")]) == 2
    assert "error: there is no folder" in capsys.readouterr().err


def test_sorted_classes_are_noted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(100), 700)
    assert is_sorted_by_class(labels)
    assert not is_sorted_by_class(rng.permutation(labels))
    assert not is_sorted_by_class(np.zeros(1000, int))
    assert not is_sorted_by_class(rng.integers(0, 2, 1000))
    folder = tmp_path / "sorted" / "train"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for k in range(12):
            for suffix, content in (("png", image_bytes(k)), ("cls", str(k // 3).encode())):
                info = tarfile.TarInfo(f"{k:03d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    index_shards(folder, progress=False)
    assert examine(folder, progress=False).notes
