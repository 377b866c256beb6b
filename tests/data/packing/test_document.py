"""docs/data.md, done as it says on a miniature ImageNet."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.writer import ShardWriter

from data.shards.manifest import load_manifest
from launcher import cli
from tests.data.conftest import image_bytes
from tests.data.imagenet import WNIDS, MiniImageNet, write_imagenet

DOCUMENT = Path(__file__).parents[3] / "docs" / "data.md"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, MiniImageNet]]:
    """The document's folders, the miniature in them, packed by the document's first command."""
    folder = tmp_path_factory.mktemp("document")
    mini = write_imagenet(folder / "datasets" / "ILSVRC2012")
    for name in ("others/train", "others/val", "captions/train"):
        write_foreign(folder / "datasets" / name, json_only=name.startswith("captions"))
    run(folder, "scl pack imagenet /datasets/ILSVRC2012 --out runs/data/imagenet")
    yield folder, mini
    shutil.rmtree(folder)


def write_foreign(folder: Path, json_only: bool) -> None:
    folder.mkdir(parents=True)
    with ShardWriter(str(folder / "%05d.tar"), maxcount=6, verbose=0) as writer:
        for k in range(20):
            about: Any = {"json": {"label": k % 3}} if json_only else {"cls": k % 3}
            writer.write({"__key__": f"{k:04d}", "jpg": image_bytes(k, "JPEG")} | about)


def here(folder: Path, text: str) -> str:
    """The document's absolute and relative places, moved into ``folder``."""
    return text.replace("/datasets/", f"{folder}/datasets/").replace(
        "runs/data/", f"{folder}/runs/data/"
    )


def run(folder: Path, command: str) -> None:
    assert cli.main(shlex.split(here(folder, command))[1:]) == 0


def commands() -> list[str]:
    """The `scl pack` commands in the document's blocks."""
    lines = [line.strip() for line in DOCUMENT.read_text().splitlines() if line[:4] == " " * 4]
    return [line.removeprefix(".venv/bin/") for line in lines if "bin/scl pack" in line]


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


def test_the_commands(place: tuple[Path, MiniImageNet], capsys) -> None:
    folder, mini = place
    assert len(commands()) == 5
    for command in commands():
        run(folder, command)
    packed = folder / "runs/data"
    assert load_manifest(packed / "imagenet/train").samples == len(mini.train)
    assert load_manifest(packed / "imagenet/val").samples == len(mini.val)
    assert load_manifest(packed / "captioned/train").source["options"] == {
        "captions": "a photo of a {}"
    }
    for name in ("others/train", "others/val", "captions/train"):
        assert load_manifest(folder / "datasets" / name).samples == 20
    output = capsys.readouterr().out
    assert "smallest class" in output and "10 (tench)" in output
    picture = folder / "runs/data/imagenet/train/contact_sheet.png"
    assert str(picture) in output and picture.read_bytes()[:4] == b"\x89PNG"


def test_the_first_batch(place: tuple[Path, MiniImageNet]) -> None:
    folder, _ = place
    found: dict[str, Any] = {}
    exec(here(folder, blocks()[0]), found)
    assert found["images"].shape == (32, 3, 224, 224)
    assert abs(float(found["images"].mean())) < 1
    assert len(found["names"]) == 32 and "tench, Tinca tinca" in found["train"].manifest.names
    assert sorted(found["train"].manifest.classes) == sorted(WNIDS)


def test_the_index(place: tuple[Path, MiniImageNet]) -> None:
    folder, mini = place
    found: dict[str, Any] = {}
    exec(here(folder, blocks()[1]), found)
    wnid = mini.classes[found["index"]["label"][17]]
    assert (wnid, found["image"]) in mini.train.values()


def test_webdataset(place: tuple[Path, MiniImageNet]) -> None:
    folder, _ = place
    shards = len(load_manifest(folder / "runs/data/imagenet/val").shards)
    found: dict[str, Any] = {}
    exec(here(folder, blocks()[2]).replace("000015", f"{shards - 1:06d}"), found)
    labels = np.load(folder / "runs/data/imagenet/val/index.npz")["label"]
    assert found["label"] == labels[0] and found["image"].mode == "RGB"


def test_timm(place: tuple[Path, MiniImageNet]) -> None:
    folder, mini = place
    found: dict[str, Any] = {}
    exec(here(folder, blocks()[3]), found)
    assert len(list(found["val"])) == len(mini.val)
    assert len(list(found["train"])) == len(mini.train) // 32 * 32 + 32


def test_what_lies_on_disk(place: tuple[Path, MiniImageNet]) -> None:
    folder, _ = place
    out = folder / "runs/data/imagenet"
    [listing] = re.findall(r"```text\n(OUT/packing.*?)```", DOCUMENT.read_text(), re.DOTALL)
    named = re.findall(r"^OUT/(\S+)", listing, re.MULTILINE)
    assert len(named) >= 8
    for name in named:
        assert (out / name.rstrip("…")).exists(), name
    text = DOCUMENT.read_text().partition("`manifest.json`:")[2].partition("\n\n")[0]
    stored = json.loads((out / "train/manifest.json").read_text())
    assert {name for name in stored if f"`{name}`" not in text} == set()
    index = np.load(out / "train/index.npz")
    assert {name: str(index[name].dtype) for name in index.files} == {
        "shard": "int32",
        "offset": "int64",
        "size": "int32",
        "label": "int32",
    }
