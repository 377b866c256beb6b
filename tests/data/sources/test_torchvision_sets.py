"""MNIST and CIFAR from files in their original binary formats, through torchvision to shards."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from data.config import DataConfig
from data.packing.pack import pack
from data.shards.manifest import load_manifest
from data.sources.torchvision_sets import torchvision_set
from data.stream.pipeline import open_split
from launcher import cli

SIZES = {"train": 200, "val": 100}


def write_mnist(root: Path, images: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> None:
    """The four idx files, as the archives hold them: big-endian header, then bytes."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split, prefix in (("train", "train"), ("val", "t10k")):
        pixels, classes = images[split], labels[split]
        head = struct.pack(">IIII", 0x803, *pixels.shape)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        head = struct.pack(">II", 0x801, len(classes))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
            head + classes.astype(np.uint8).tobytes()
        )


def write_cifar(root: Path, kind: type, images: dict[str, np.ndarray], key: str) -> list[str]:
    """Pickled batches as the archives hold them: rows of 3 × 1024 bytes, one colour plane each."""
    folder = root / kind.base_folder  # type: ignore[attr-defined]
    folder.mkdir(parents=True)
    names = [f"class{i}" for i in range(100 if key == "fine_labels" else 10)]
    meta = kind.meta  # type: ignore[attr-defined]
    (folder / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: names}))
    for split, files in (("train", kind.train_list), ("val", kind.test_list)):  # type: ignore[attr-defined]
        parts = np.array_split(images[split], len(files))
        first = 0
        for (name, _), part in zip(files, parts, strict=True):
            rows = part.transpose(0, 3, 1, 2).reshape(len(part), -1)
            values = [(first + i) % len(names) for i in range(len(part))]
            (folder / name).write_bytes(pickle.dumps({"data": rows, key: values}))
            first += len(part)
    return names


def vouch_for(kind: type, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision knows the published files by their MD5: let it know these."""
    folder = root / kind.base_folder  # type: ignore[attr-defined]

    def md5(name: str) -> str:
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for attribute in ("train_list", "test_list"):
        files = [[name, md5(name)] for name, _ in getattr(kind, attribute)]
        monkeypatch.setattr(kind, attribute, files)
    meta = kind.meta  # type: ignore[attr-defined]
    monkeypatch.setattr(kind, "meta", meta | {"md5": md5(meta["filename"])})


def packed_images(out: Path, split: str, size: int) -> dict[bytes, int]:
    """Pixels → label of every packed sample, read as training reads them."""
    config = DataConfig(path=out, image_size=size, eval_crop_ratio=1.0)
    found = {}
    dataset = open_split(config, split)  # type: ignore[arg-type]
    manifest = load_manifest(out / split)
    for shard in sorted((out / split).glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]
        for name, content in members.items():
            if name.endswith(".png"):
                label = int(members[name.rpartition(".")[0] + ".cls"])
                found[np.asarray(Image.open(io.BytesIO(content))).tobytes()] = label
    assert len(found) == manifest.samples == sum(dataset.shard_sizes)
    return found


def test_mnist_idx_files_become_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    images = {s: generator.integers(0, 256, (n, 28, 28), np.uint8) for s, n in SIZES.items()}
    labels = {s: np.arange(n) % 10 for s, n in SIZES.items()}
    write_mnist(tmp_path / "in", images, labels)
    out = tmp_path / "out"
    words = ["pack", "torchvision", "MNIST", "--root", tmp_path / "in", "--out", out]
    assert cli.main([*map(str, words), "--workers", "1"]) == 0, capsys.readouterr().err
    for split, pixels in images.items():
        found = packed_images(out, split, 28)
        assert found == {p.tobytes(): i % 10 for i, p in enumerate(pixels)}
    manifest = load_manifest(out / "train")
    assert manifest.image.channels == 1 and len(manifest.classes) == 10


@pytest.mark.parametrize(
    ("name", "key"), [("CIFAR10", "labels"), ("CIFAR100", "fine_labels")], ids=["10", "100"]
)
def test_cifar_pickles_become_shards(
    name: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = getattr(torchvision.datasets, name)
    generator = np.random.default_rng(0)
    images = {s: generator.integers(0, 256, (n, 32, 32, 3), np.uint8) for s, n in SIZES.items()}
    names = write_cifar(tmp_path / "in", kind, images, key)
    vouch_for(kind, tmp_path / "in", monkeypatch)
    out = tmp_path / "out"
    pack(torchvision_set(name, tmp_path / "in"), out, progress=False)
    for split, pixels in images.items():
        found = packed_images(out, split, 32)
        assert found == {p.tobytes(): i % len(names) for i, p in enumerate(pixels)}
    assert load_manifest(out / "train").classes == names
    assert load_manifest(out / "train").image.channels == 3


def test_a_damaged_file_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = torchvision.datasets.CIFAR10
    images = {s: np.zeros((n, 32, 32, 3), np.uint8) for s, n in SIZES.items()}
    write_cifar(tmp_path / "in", kind, images, "labels")
    vouch_for(kind, tmp_path / "in", monkeypatch)
    path = tmp_path / "in" / kind.base_folder / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-1])
    # Nothing is fetched from here.
    monkeypatch.setattr(kind, "url", "file:///nowhere.invalid/cifar.tar.gz")
    words = ["pack", "torchvision", "CIFAR10", "--root", tmp_path / "in", "--out", tmp_path / "out"]
    assert cli.main([*map(str, words)]) == 2
    said = capsys.readouterr().err
    assert "CIFAR10 was not found under" in said and "put the files there" in said
    assert not (tmp_path / "out").exists()
