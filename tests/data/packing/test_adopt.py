"""Shards of others: what `scl pack index` takes over, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from webdataset.writer import TarWriter

from data.errors import DataError
from data.packing.adopt import index_shards
from data.shards.doctor import examine
from data.shards.index import SampleIndex
from data.shards.manifest import Manifest, load_manifest, verify_shards
from launcher import cli


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


def test_what_is_in_no_sample_is_counted_named_and_past_a_share_refused(
    tmp_path: Path, image_bytes, make_tar
) -> None:
    folder = tmp_path / "train"
    members = [
        member
        for k in range(3)
        for member in ((f"{k}.png", image_bytes(k)), (f"{k}.cls", str(k).encode()))
    ]
    make_tar(folder / "0.tar", [*members, ("x.gif", b"GIF89a")])
    with pytest.raises(
        DataError,
        match=r"of 4 images in .*train 1 would be left out \(1 in formats that are not read, "
        r"x\.gif in 0\.tar\); .* --leave-out 0\.25",
    ):
        index_shards(folder, progress=False)
    assert not (folder / "manifest.json").exists()
    assert cli.main(["pack", "index", str(folder), "--leave-out", "0.25"]) == 0
    assert load_manifest(folder).samples == 3
    assert "1 images are no samples, in formats that are not read: x.gif in 0.tar" in str(
        examine(folder, progress=False).notes
    )


@pytest.mark.parametrize("content", [b"20240115", b"1700000000"])
def test_labels_that_count_no_classes_are_refused_at_once(
    tmp_path: Path, image_bytes, make_tar, content: bytes
) -> None:
    make_tar(tmp_path / "train" / "0.tar", [("k.png", image_bytes(0)), ("k.cls", content)])
    with pytest.raises(DataError, match=r"has the label .*; is this a date or an identifier\?"):
        index_shards(tmp_path / "train", progress=False)


def test_val_has_the_classes_of_train_and_no_others(tmp_path: Path, image_bytes) -> None:
    _write_foreign(tmp_path / "train", image_bytes, [[0, 1, 2]])
    index_shards(tmp_path / "train", classes=["owl", "cat", "dog"], progress=False)
    _write_foreign(tmp_path / "val", image_bytes, [[1]])
    assert index_shards(tmp_path / "val", progress=False).classes == ["owl", "cat", "dog"]
    _write_foreign(tmp_path / "test", image_bytes, [[1, 3]])
    with pytest.raises(DataError, match=r"labels up to 3 but only 3 class names train has"):
        index_shards(tmp_path / "test", progress=False)
