"""The picture of a packing, looked at pixel by pixel, and the counts beside it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.errors import DataError
from data.packing.contact_sheet import draw_contact_sheet
from data.packing.pack import pack
from data.packing.summary import check_against_source, summarise
from data.shards.index import SampleIndex
from data.shards.manifest import load_manifest
from data.sources.source import ArrayReader, Source

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    """60 red, 30 green and 6 blue images, in no order."""
    labels = np.repeat([0, 1, 2], [60, 30, 6])
    colours = np.array(list(COLOURS.values()), np.uint8)
    pixels = np.broadcast_to(colours[labels][:, None, None], (96, 20, 30, 3)).copy()
    source = Source("test", "colours", list(COLOURS), {"train": ArrayReader(pixels, labels)})
    pack(source, tmp_path, shard_samples=40, progress=False)
    return tmp_path / "train"


def sheet_of(folder: Path) -> np.ndarray:
    path = draw_contact_sheet(folder, load_manifest(folder))
    assert path == folder / "contact_sheet.png"
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))


def centres(sheet: np.ndarray) -> list[tuple[int, ...]]:
    return [
        tuple(sheet[44 + row * 152 + 64, 16 + column * 136 + 64].tolist())
        for row in range(8)
        for column in range(8)
    ]


def test_samples_stand_in_the_order_of_classes_in_their_shares(coloured: Path) -> None:
    found = centres(sheet_of(coloured))
    red, green, blue = COLOURS.values()
    assert found == [red] * 40 + [green] * 20 + [blue] * 4


def test_bars_are_as_high_as_classes_are_large(coloured: Path) -> None:
    sheet = sheet_of(coloured)
    bars = (sheet == np.array([0x48, 0x78, 0xA8])).all(-1)
    third = (sheet.shape[1] - 32) // 3
    heights = [int(bars[:, 16 + k * third + third // 2].sum()) for k in range(3)]
    assert heights == pytest.approx([150, 75, 15], abs=1.5)


def test_damage_is_red(coloured: Path) -> None:
    manifest = load_manifest(coloured)
    index = SampleIndex.load(coloured / "index.npz")
    for i in np.flatnonzero(index.label == 2):
        with (coloured / manifest.shards[index.shard[i]].name).open("r+b") as stream:
            stream.seek(int(index.offset[i]))
            stream.write(b"\0" * 20)
    assert centres(sheet_of(coloured))[-4:] == [(0xC0, 0x30, 0x20)] * 4


def test_the_same_packing_gives_the_same_picture(packed_digits: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(packed_digits / "val", tmp_path / "val")
    first = draw_contact_sheet(copy, load_manifest(copy)).read_bytes()
    assert draw_contact_sheet(copy, load_manifest(copy)).read_bytes() == first


def test_counts_are_those_of_the_index(coloured: Path) -> None:
    found = summarise(coloured, load_manifest(coloured))
    assert (found.split, found.samples, found.classes, found.shards) == ("train", 96, 3, 3)
    assert (found.smallest, found.largest) == (("blue", 6), ("red", 60))
    assert found.bytes == sum(path.stat().st_size for path in coloured.glob("*.tar"))


def test_shards_that_hold_something_else_are_noticed(coloured: Path) -> None:
    index = SampleIndex.load(coloured / "index.npz")
    check_against_source(coloured, index, index.label[::-1])
    with pytest.raises(DataError, match=r"hold 60 samples of class 0, but the source has 61"):
        check_against_source(coloured, index, np.append(index.label, 0))


def test_timm_finds_its_file(coloured: Path) -> None:
    splits = json.loads((coloured.parent / "_info.json").read_text())["splits"]
    assert splits["train"]["num_samples"] == sum(splits["train"]["shard_lengths"]) == 96
    assert all((coloured.parent / name).is_file() for name in splits["train"]["filenames"])
