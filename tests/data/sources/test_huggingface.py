"""Parquet files as the Hugging Face hub has them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.errors import DataError
from data.packing.pack import pack
from data.shards.index import SampleIndex
from data.shards.manifest import load_manifest
from data.sources.huggingface import huggingface
from tests.data.conftest import image_bytes

NAMES = ["cat", "dog", "owl"]
FEATURES = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}


def write(
    path: Path,
    labels: list[int | None],
    first: int = 0,
    features: dict | None = FEATURES,
    names: tuple[str, str] = ("image", "label"),
    images: list[Any] | None = None,
) -> Path:
    """One file in the form that `datasets` writes, a few rows to the group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    if images is None:
        images = [content(first + k) for k in range(len(labels))]
    stored = [{"bytes": image, "path": None} for image in images]
    table = pa.table(
        {names[0]: pa.array(stored, kind), names[1]: pa.array(labels, pa.int64())},
        metadata={"huggingface": json.dumps({"info": {"features": features}})} if features else {},
    )
    pq.write_table(table, path, row_group_size=4)
    return path


def content(k: int) -> bytes:
    return image_bytes(k, "JPEG" if k % 2 else "PNG")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`pets`: 2 × 11 training, 5 validation and 3 unlabelled test images, in the hub's layout."""
    data = tmp_path / "pets" / "data"
    write(data / "train-00000-of-00002.parquet", [k % 3 for k in range(11)])
    write(data / "train-00001-of-00002.parquet", [k % 2 for k in range(11)], first=11)
    write(data / "validation-00000-of-00001.parquet", [2, 1, 0, 1, 1], first=50)
    write(data / "test-00000-of-00001.parquet", [-1, -1, -1], first=90)
    return tmp_path / "pets"


def read(out: Path) -> list[tuple[int, bytes]]:
    index = SampleIndex.load(out / "index.npz")
    shards = [(out / shard.name).read_bytes() for shard in load_manifest(out).shards]
    return [
        (int(label), shards[shard][first : first + size])
        for shard, first, size, label in zip(
            index.shard, index.offset, index.size, index.label, strict=True
        )
    ]


def files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_rows_become_samples(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifests = pack(huggingface(folder, out), out, shard_samples=5, progress=False)
    labels = [k % 3 for k in range(11)] + [k % 2 for k in range(11)]
    assert sorted(read(out / "train")) == sorted((n, content(k)) for k, n in enumerate(labels))
    wanted = [(label, content(50 + k)) for k, label in enumerate([2, 1, 0, 1, 1])]
    assert sorted(read(out / "val")) == sorted(wanted)
    assert manifests["train"].classes == NAMES
    assert manifests["train"].dataset == "pets"
    assert not (out / ".rows").exists()


def test_workers_do_not_change_a_byte(folder: Path, tmp_path: Path) -> None:
    for out, workers in ((tmp_path / "one", 1), (tmp_path / "two", 2)):
        pack(huggingface(folder, out), out, shard_samples=5, workers=workers, progress=False)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_an_interrupted_copy_goes_on(folder: Path, tmp_path: Path, monkeypatch) -> None:
    plain, out = tmp_path / "plain", tmp_path / "out"
    pack(huggingface(folder, plain), plain, progress=False)
    source = huggingface(folder, out)
    second = folder / "data/train-00001-of-00002.parquet"
    whole = second.read_bytes()
    # The columns at the end of the file can still be read, the images no more.
    second.write_bytes(b"\0" * 2000 + whole[2000:])
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet cannot be read"):
        pack(source, out, progress=False)
    kept = out / ".rows/train/00000.bin"
    before = kept.stat().st_mtime_ns
    assert not (out / ".rows/train/00001.bin").exists()
    second.write_bytes(whole)
    seen = []
    real = type(source.splits["train"]).read
    monkeypatch.setattr(
        type(source.splits["train"]),
        "read",
        lambda self, i: (seen.append(kept.stat().st_mtime_ns), real(self, i))[1],
    )
    pack(huggingface(folder, out), out, progress=False)
    assert set(seen) == {before}
    assert files(out) == files(plain)


def test_columns_and_splits_of_other_names(tmp_path: Path) -> None:
    # As the hub's own conversion lays files out, and as CIFAR-100 calls its columns.
    features = {"img": {"_type": "Image"}, "fine": {"_type": "ClassLabel", "names": NAMES}}
    features["coarse"] = {"_type": "ClassLabel", "names": ["pet"]}
    names = ("img", "fine")
    write(tmp_path / "in/default/train/0000.parquet", [0, 1], features=features, names=names)
    write(tmp_path / "in/default/test/0000.parquet", [2], features=features, names=names)
    with pytest.raises(DataError, match=r"no column 'label' \(it has img, fine\); .*--label-col"):
        huggingface(tmp_path / "in", tmp_path / "out")
    source = huggingface(tmp_path / "in", tmp_path / "out", label_column="fine")
    assert source.samples() == {"train": 2, "val": 1}
    assert source.options == {"image_column": "img", "label_column": "fine"}
    assert source.classes == NAMES


def test_classes_without_names_are_numbers(tmp_path: Path) -> None:
    write(tmp_path / "in/train-0.parquet", [3, 0], features=None)
    assert huggingface(tmp_path / "in", tmp_path).classes == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("labels", "images", "sentence"),
    [
        ([0, None], None, r"column 'label' of .* has no label in row 1"),
        ([0, -1], None, r"has no label in row 1 \(integers from 0 are needed\)"),
        ([0, 3], None, r"has labels up to 3 but names only 3 classes"),
        ([0] * 6, [content(0)] * 5 + [None], r"row 5 of .*train-0\.parquet has no image bytes"),
        ([0] * 6, [content(0)] * 5 + [b"?"], r"row 5 of .* is not an image that can be decoded"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, labels, images, sentence: str) -> None:
    write(tmp_path / "in/train-0.parquet", labels, images=images)
    with pytest.raises(DataError, match=sentence):
        pack(huggingface(tmp_path / "in", tmp_path / "o"), tmp_path / "o", progress=False)


def test_what_is_not_there_is_said(tmp_path: Path, folder: Path, monkeypatch) -> None:
    with pytest.raises(DataError, match=r"holds no training split \(train-\*\.parquet"):
        huggingface(tmp_path / "nowhere", tmp_path)
    damaged = tmp_path / "in/train-0.parquet"
    write(damaged, [0]).write_bytes(b"PAR1 torn")
    with pytest.raises(DataError, match=r"train-0\.parquet is not a whole parquet file"):
        huggingface(tmp_path / "in", tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"needs pyarrow; .*pip install 'scl-train\[huggingface\]'"):
        huggingface(folder, tmp_path)


def test_order_is_that_of_the_seed_not_of_the_files(folder: Path, tmp_path: Path) -> None:
    pack(huggingface(folder, tmp_path / "o"), tmp_path / "o", progress=False)
    order = [content(k) for k in range(22)]
    found = [order.index(image) for _, image in read(tmp_path / "o/train")]
    assert sorted(found) == list(range(22))
    assert np.abs(np.diff(found)).mean() > 3


def with_names(names: list[str]) -> dict[str, Any]:
    return {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}


def test_one_of_several_configurations_is_chosen_not_merged(tmp_path: Path) -> None:
    data = tmp_path / "pets"
    write(data / "small" / "train-00000-of-00001.parquet", [0, 1, 2])
    write(data / "small" / "test-00000-of-00001.parquet", [0])
    other = with_names(["dog", "owl", "cat"])
    write(data / "large" / "train" / "0000.parquet", [0, 1, 2, 2], features=other)
    write(data / "large" / "validation" / "0000.parquet", [2], features=other)
    with pytest.raises(DataError, match=r"2 configurations \(large, small\), .* with --config"):
        huggingface(data, tmp_path / "out")
    with pytest.raises(DataError, match=r"no configuration 'huge' .*; there is large, small"):
        huggingface(data, tmp_path / "out", config="huge")
    large = huggingface(data, tmp_path / "out", config="large")
    assert (large.classes, large.samples()) == (["dog", "owl", "cat"], {"train": 4, "val": 1})
    assert large.notes == ["left out the configuration small"]
    small = huggingface(data, tmp_path / "out", config="small")
    assert (small.classes, small.samples()) == (NAMES, {"train": 3, "val": 1})
    assert small.notes == ["val is the split test", "left out the configuration large"]


def test_labels_go_by_the_names_of_classes(tmp_path: Path) -> None:
    data = tmp_path / "pets" / "data"
    write(data / "train-00000-of-00002.parquet", [0, 1, 2])
    other = with_names(["owl", "cat", "dog", "newt"])
    write(data / "train-00001-of-00002.parquet", [0, 1, 2], features=other)
    write(data / "validation-00000-of-00001.parquet", [1, 0], features=other)
    source = huggingface(tmp_path / "pets", tmp_path / "out")
    assert source.classes == NAMES
    assert source.splits["train"].labels.tolist() == [0, 1, 2, 2, 0, 1]
    assert source.splits["val"].labels.tolist() == [0, 2]
    write(data / "validation-00000-of-00001.parquet", [3], features=other)
    with pytest.raises(DataError, match=r"classes that the first file of train has not \(newt\)"):
        huggingface(tmp_path / "pets", tmp_path / "out")


def test_what_is_not_packed_of_the_hub_is_named(folder: Path, tmp_path: Path) -> None:
    assert huggingface(folder, tmp_path / "out").notes == ["left out the split test of 1 files"]
    (folder / "data" / "validation-00000-of-00001.parquet").unlink()
    (folder / "data" / "test-00000-of-00001.parquet").unlink()
    assert huggingface(folder, tmp_path / "out").notes == [
        "no val split: there is none called validation, val, valid or test"
    ]


def test_a_label_that_counts_no_classes_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "d" / "train-0-of-1.parquet", [20240115], features=None)
    with pytest.raises(DataError, match=r"column 'label' .* is this a date or an identifier"):
        huggingface(tmp_path / "d", tmp_path / "out")
