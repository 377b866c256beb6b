"""Shards of others: what `scl pack index` takes over, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from webdataset.writer import TarWriter

from data.errors import DataError
from data.packing.adopt import index_shards
from data.shards.index import SampleIndex
from data.shards.manifest import Manifest, load_manifest, verify_shards


def _write_foreign(folder: Path, image_bytes, labels: list[list[int]]) -> None:
    folder.mkdir(parents=True)
    position = 0
    for k, shard in enumerate(labels):
        with TarWriter(str(folder / f"{k:05d}.tar")) as writer:
            for label in shard:
                key = f"{k:05d}{position:04d}"
                meta = {"key": key, "status": "success"}
                image = image_bytes(position, "JPEG")
                writer.write({"__key__": key, "jpg": image, "cls": label, "json": meta, "txt": "a"})
                position += 1


def test_shards_of_others_are_taken_over(tmp_path: Path, image_bytes) -> None:
    folder = tmp_path / "birds" / "train"
    _write_foreign(folder, image_bytes, [[0, 2, 1], [1, 4]])
    (folder / "00000_stats.json").write_text(json.dumps({"successes": 3}))
    manifest = index_shards(folder, progress=False)
    assert manifest == load_manifest(folder)
    verify_shards(folder, manifest)
    assert (manifest.dataset, manifest.split, manifest.samples) == ("birds", "train", 5)
    assert [shard.samples for shard in manifest.shards] == [3, 2]
    assert manifest.classes == ["0", "1", "2", "3", "4"]
    assert manifest.image.channels == 3
    _check_bytes(folder, manifest, image_bytes)


def _check_bytes(folder: Path, manifest: Manifest, image_bytes) -> None:
    index = SampleIndex.load(folder / "index.npz")
    for i in range(len(index)):
        content = (folder / manifest.shards[index.shard[i]].name).read_bytes()
        first = int(index.offset[i])
        assert content[first : first + int(index.size[i])] == image_bytes(i, "JPEG")


def test_val_takes_over_what_train_knows(tmp_path: Path, image_bytes) -> None:
    _write_foreign(tmp_path / "train", image_bytes, [[0, 1, 2, 3]])
    _write_foreign(tmp_path / "val", image_bytes, [[1]])
    train = index_shards(tmp_path / "train", classes=list("abcd"), dataset="x", progress=False)
    val = index_shards(tmp_path / "val", progress=False)
    assert train.classes == list("abcd")
    assert train.dataset == "x"
    assert val.image == train.image
    assert len(val.classes) == 4


def test_index_sentences(tmp_path: Path, image_bytes, make_tar) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        index_shards(tmp_path / "no", progress=False)
    with pytest.raises(DataError, match=r"holds no \.tar files"):
        index_shards(tmp_path, progress=False)
    _write_foreign(tmp_path / "train", image_bytes, [[0, 5]])
    with pytest.raises(DataError, match=r"labels up to 5 but only 2 class names"):
        index_shards(tmp_path / "train", classes=["a", "b"], progress=False)
    make_tar(tmp_path / "bad" / "0.tar", [("k.png", b"no image"), ("k.cls", b"0")])
    with pytest.raises(DataError, match=r"none of 1 images read from .*bad can be decoded"):
        index_shards(tmp_path / "bad", progress=False)
