"""What can be packed, and what is refused with which sentence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torchvision.datasets

from data.errors import DataError
from data.images.decode import decode
from data.sources.digits import digits
from data.sources.image_folder import imagefolder
from data.sources.source import FileReader
from data.sources.torchvision_sets import torchvision_set


def test_digits_are_split_once_and_for_all() -> None:
    source = digits()
    assert source.samples() == {"train": 1437, "val": 360}
    assert source.fingerprint() == digits().fingerprint()
    share = np.bincount(source.splits["val"].labels) / np.bincount(source.splits["train"].labels)
    assert np.allclose(share, 0.25, atol=0.02)
    content, extension, label = source.splits["train"].read(0)
    pixels = np.asarray(decode(content))
    assert (extension, pixels.shape, pixels.dtype) == ("png", (8, 8), np.uint8)
    assert label == source.splits["train"].labels[0]
    assert pixels.max() == 255


def test_imagefolder_passes_bytes_through(make_folder) -> None:
    root = make_folder({"train/dog": 2, "train/cat": 3, "val/cat": 1})
    (root / "train" / ".cache").mkdir()
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    source = imagefolder(root)
    assert (source.name, source.classes) == ("raw", ["cat", "dog"])
    assert source.samples() == {"train": 5, "val": 1}
    read = [source.splits["train"].read(i) for i in range(5)]
    assert [(extension, label) for _, extension, label in read] == [
        ("jpg", 0),
        ("png", 0),
        ("webp", 0),
        ("jpg", 1),
        ("png", 1),
    ]
    assert read[0][0] == (root / "train/cat/a.0.JPEG").read_bytes()


def test_imagefolder_without_splits_can_hold_out(make_folder) -> None:
    root = make_folder({"a": 10, "b": 20})
    assert imagefolder(root).samples() == {"train": 30}
    source, again = imagefolder(root, 0.2), imagefolder(root, 0.2)
    assert np.bincount(source.splits["val"].labels).tolist() == [2, 4]
    assert source.fingerprint() == again.fingerprint()
    train, val = source.splits["train"], source.splits["val"]
    assert isinstance(train, FileReader)
    assert isinstance(val, FileReader)
    assert not set(train.names) & set(val.names)


def test_fingerprint_sees_another_file_list(make_folder) -> None:
    root = make_folder({"train/a": 2, "train/b": 1})
    before = imagefolder(root).fingerprint()
    (root / "train/a/a.0.JPEG").rename(root / "train/b/a.0.JPEG")
    assert imagefolder(root).fingerprint() != before


@pytest.mark.parametrize(
    ("folders", "val_fraction", "sentence"),
    [
        ({}, None, r"there is no folder .*raw; give"),
        ({"train/a": 1, "train/b": 0}, None, r"class folder .*b holds no images"),
        ({"train/a": 1, "val/z": 1}, None, r"val has classes that .*train has not \(z\)"),
        ({"train/a": 1, "val/a": 0}, None, r"val holds no images"),
        ({"train/a": 4, "val/a": 1}, 0.5, r"has a val folder already \(val/\); leave out --val"),
        ({"a": 4}, 1.5, r"--val-fraction is 1.5; it must lie between 0 and 1"),
        ({"a": 4, "b": 1}, 0.5, r"--val-fraction 0.5 cannot be held out .*: b has one image only"),
    ],
)
def test_bad_folders_are_refused(
    tmp_path: Path, make_folder, folders: dict, val_fraction: float | None, sentence: str
) -> None:
    if folders:
        make_folder(folders)
    with pytest.raises(DataError, match=sentence):
        imagefolder(tmp_path / "raw", val_fraction)


def test_folder_without_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no class folders; images are expected in"):
        imagefolder(tmp_path)


@pytest.mark.parametrize("damage", ["text", "truncated", "gif", "gone"])
def test_what_cannot_be_decoded_is_named(make_folder, image_bytes, damage: str) -> None:
    root = make_folder({"train/a": 1})
    path = root / "train/a/a.0.JPEG"
    source = imagefolder(root)
    if damage == "gone":
        path.unlink()
    else:
        whole = image_bytes(0, "JPEG", side=64)
        path.write_bytes(
            {
                "text": b"hello",
                "truncated": whole[: len(whole) // 2],
                "gif": image_bytes(0, "GIF"),
            }[damage]
        )
    with pytest.raises(DataError, match=r"a\.0\.JPEG is not an image that can be decoded"):
        source.splits["train"].read(0)


def test_torchvision_arrays_from_disk(tmp_path: Path, monkeypatch) -> None:
    def cifar(root: str, train: bool, download: bool) -> SimpleNamespace:
        assert root == str(tmp_path)
        assert not download
        images = np.full((4 if train else 2, 6, 6, 3), 7, np.uint8)
        return SimpleNamespace(data=images, targets=[0, 1] * (len(images) // 2), classes=["x", "y"])

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", cifar)
    source = torchvision_set("CIFAR10", tmp_path)
    assert (source.samples(), source.classes) == ({"train": 4, "val": 2}, ["x", "y"])
    content, extension, label = source.splits["val"].read(1)
    assert (extension, label) == ("png", 1)
    assert (np.asarray(decode(content)) == 7).all()


def test_torchvision_downloads_what_is_not_on_disk(tmp_path: Path, monkeypatch) -> None:
    calls = []

    def mnist(root: str, train: bool, download: bool) -> SimpleNamespace:
        calls.append(download)
        if not download:
            raise RuntimeError("Dataset not found")
        return SimpleNamespace(
            data=np.zeros((2, 4, 4), np.uint8), targets=np.array([0, 1]), classes=["0", "1"]
        )

    monkeypatch.setattr(torchvision.datasets, "MNIST", mnist)
    assert torchvision_set("MNIST", tmp_path).samples() == {"train": 2, "val": 2}
    assert calls == [False, True, False, True]


def test_imagenette_files_are_passed_through(tmp_path: Path, make_folder) -> None:
    wnids = ["n01440764", "n02102040"]
    counts = {f"{split}/{wnid}": 1 for split in ("train", "val") for wnid in wnids}
    make_folder(counts, tmp_path / "imagenette2-160")
    source = torchvision_set("Imagenette", tmp_path, size="160px")
    assert source.classes == ["tench", "English springer"]
    assert source.samples() == {"train": 2, "val": 2}
    original = (tmp_path / "imagenette2-160/val/n02102040/a.0.JPEG").read_bytes()
    assert source.splits["val"].read(1) == (original, "jpg", 1)


def test_torchvision_sentences(tmp_path: Path, monkeypatch) -> None:
    def unreachable(root: str, train: bool, download: bool) -> None:
        raise RuntimeError("no route\nto host" if download else "Dataset not found")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", unreachable)
    with pytest.raises(
        DataError, match=r"CIFAR100 was not found under .* \(no route\); put the files there"
    ):
        torchvision_set("CIFAR100", tmp_path)
    with pytest.raises(DataError, match=r"'SVHN' is unknown; use CIFAR10, .*Imagenette"):
        torchvision_set("SVHN", tmp_path)
    with pytest.raises(DataError, match=r"no size '80px'; use full, 320px, 160px"):
        torchvision_set("Imagenette", tmp_path, size="80px")
