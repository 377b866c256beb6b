"""Pieces of shards: where they are cut, what is written of them, and what is noticed."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.packing.adopt import index_shards
from data.packing.pieces import add_pieces
from data.shards import pieces as pieces_module
from data.shards.doctor import examine
from data.shards.index import SampleIndex, key_at
from data.shards.manifest import load_manifest
from data.shards.pieces import PIECES_NAME, cuts, may_be_cut, parse_pieces, pieces_of
from launcher import cli


@pytest.fixture
def digits(packed_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The digits, each shard of which may be cut into ten pieces and more."""
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 10_000)
    monkeypatch.setattr(pieces_module, "LEAST_SAMPLES", 5)
    return shutil.copytree(packed_digits, tmp_path / "digits")


def test_every_image_lies_in_one_piece(digits: Path, capsys: pytest.CaptureFixture) -> None:
    train = digits / "train"
    before = {path.name: path.read_bytes() for path in train.iterdir()}
    assert cli.main(["pack", "pieces", str(digits)]) == 0
    assert f"{train}: 17 shards, 281 pieces" in capsys.readouterr().out
    content = (train / PIECES_NAME).read_bytes()
    # What a run or a checkpoint knows of the set is as it was.
    after = {path.name: path.read_bytes() for path in train.iterdir()}
    assert after == before | {PIECES_NAME: content}
    shards, index = load_manifest(train).shards, SampleIndex.load(train / "index.npz")
    found = pieces_of(shards, parse_pieces(content, "pieces"))
    assert found is not None
    for number, (shard, pieces) in enumerate(zip(shards, found, strict=True)):
        whole = (train / shard.name).read_bytes()
        parts = [whole[piece.first : piece.end] for piece in pieces]
        assert b"".join(parts) == whole and len(pieces) > 10
        assert [hashlib.sha256(part).hexdigest() for part in parts] == [p.sha256 for p in pieces]
        ends = [piece.end for piece in pieces]
        of_shard = index.shard == number
        first, last = index.offset[of_shard], (index.offset + index.size)[of_shard]
        piece_of = np.searchsorted(ends, first, side="right")
        assert (last <= np.array(ends)[piece_of]).all()
        assert np.bincount(piece_of).min() >= 5
        # With its tar header, from which its name is read.
        (train / "part").write_bytes(parts[3])
        sample = int(np.flatnonzero(piece_of == 3)[0])
        offset = int(first[sample])
        assert key_at(train / "part", offset - pieces[3].first) == key_at(
            train / shard.name, offset
        )


def test_packing_and_indexing_write_the_same_pieces(digits: Path) -> None:
    add_pieces(digits / "train", progress=False)
    content = (digits / "train" / PIECES_NAME).read_bytes()
    (digits / "train" / PIECES_NAME).unlink()
    index_shards(digits / "train", progress=False)
    assert (digits / "train" / PIECES_NAME).read_bytes() == content
    # Packing goes by another way: each shard as it is written.
    again = digits.parent / "again"
    assert cli.main(["pack", "digits", "--out", str(again), "--workers", "1"]) == 0
    assert (again / "train" / PIECES_NAME).read_bytes() == content


def test_small_shards_stay_whole(packed_digits: Path, tmp_path: Path) -> None:
    assert not (packed_digits / "train" / PIECES_NAME).exists()
    shards = load_manifest(packed_digits / "train").shards
    assert not any(map(may_be_cut, shards))
    folder = shutil.copytree(packed_digits / "train", tmp_path / "train")
    (folder / PIECES_NAME).write_bytes(b"of an earlier packing")
    assert add_pieces(folder, progress=False) == 17
    assert not (folder / PIECES_NAME).exists()


def test_pieces_are_of_some_size_and_of_some_samples() -> None:
    """ImageNet's shards in sixteen of 34 MB; of large images no fewer than 256 in a piece."""
    assert len(cuts(110_000 * np.arange(5_004), 110_000 * 5_004)) == 16
    assert len(cuts(2_000_000 * np.arange(5_004), 2_000_000 * 5_004)) == 5_004 // 256
    # Links of a tar lead to one image from several samples.
    assert len(cuts(np.zeros(5_004, np.int64), 1 << 30)) == 1


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:-100], "it is no list of pieces"),
        (lambda content: b"", "it is no list of pieces"),
    ],
)
def test_a_damaged_list_is_named(digits: Path, damage, reason: str) -> None:
    add_pieces(digits / "train", progress=False)
    path = digits / "train" / PIECES_NAME
    path.write_bytes(damage(path.read_bytes()))
    [problem] = examine(digits / "train", progress=False).problems
    assert problem.file == path and reason in problem.reason
    assert "scl pack pieces" in problem.reason


def test_the_doctor_compares_pieces_with_shards(digits: Path) -> None:
    train, val = digits / "train", digits / "val"
    for folder in (train, val):
        add_pieces(folder, progress=False)
        assert examine(folder, progress=False).problems == []
    content = (train / PIECES_NAME).read_bytes()
    cut = parse_pieces(content, "pieces")
    cut[2].sha256[1] = cut[2].sha256[0]
    pieces_module.write_pieces(train, cut)
    [problem] = examine(train, progress=False).problems
    assert problem.file.name == "shard-000002.tar" and "does not describe it" in problem.reason
    (val / PIECES_NAME).write_bytes(content)
    [problem] = examine(val, quick=True, progress=False).problems
    assert problem.file.name == PIECES_NAME and "of other shards" in problem.reason


def test_shards_that_have_changed_are_not_cut(digits: Path) -> None:
    shard = digits / "train" / "shard-000003.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:512] + bytes(b ^ 255 for b in content[512:600]) + content[600:])
    with pytest.raises(DataError, match=r"shard-000003.tar has changed since it was packed"):
        add_pieces(digits / "train", progress=False)
    assert not (digits / "train" / PIECES_NAME).exists()
