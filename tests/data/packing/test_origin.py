"""Packing again what has changed since: what differs is said, and old bytes are not kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data.errors import DataError
from data.packing.encoding import Encoding
from data.packing.pack import pack
from data.sources.image_folder import imagefolder
from tests.data.conftest import MakeFolder, image_bytes


@pytest.fixture
def root(make_folder: MakeFolder) -> Path:
    return make_folder({"train/cat": 4, "train/dog": 3, "val/cat": 2})


@pytest.mark.parametrize("encoding", [Encoding(), Encoding(max_side=8)])
def test_an_image_with_other_bytes_is_noticed(
    root: Path, tmp_path: Path, encoding: Encoding
) -> None:
    out = tmp_path / "out"
    pack(imagefolder(root), out, encoding=encoding, progress=False)
    changed = root / "train" / "cat" / "a.1.png"
    before = changed.stat()
    changed.write_bytes(image_bytes(99))
    # Even of the same size, as an edited bitmap would be.
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(
        DataError, match=r"1 images have changed since they were packed into .* \(.*cat/a\.1\.png\)"
    ):
        pack(imagefolder(root), out, encoding=encoding, progress=False)


def test_a_change_is_noticed_when_an_interrupted_packing_goes_on(
    root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pack(imagefolder(root), out, progress=False)
    for split in ("train", "val"):
        (out / split / "manifest.json").unlink()
    (root / "val" / "cat" / "a.0.JPEG").write_bytes(image_bytes(99, "JPEG"))
    with pytest.raises(DataError, match=r"have changed since .*val/cat/a\.0\.JPEG"):
        pack(imagefolder(root), out, progress=False)


def test_a_copy_of_the_same_images_is_the_same_set(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifests = pack(imagefolder(root), out, progress=False)
    for path in root.rglob("*.*"):
        os.utime(path, ns=(0, 7))
    assert pack(imagefolder(root), out, progress=False) == manifests
    # What has been compared once is not read again.
    reader = imagefolder(root).splits["train"]
    noted = (out / "origin.npz").stat().st_mtime_ns
    assert pack(imagefolder(root), out, progress=False) == manifests
    assert (out / "origin.npz").stat().st_mtime_ns == noted and len(reader.labels) == 7


def test_what_differs_is_said(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(imagefolder(root), out, progress=False)
    (root / "train" / "owl").mkdir()
    (root / "train" / "owl" / "new.png").write_bytes(image_bytes(50))
    (root / "train" / "cat" / "a.0.JPEG").rename(root / "train" / "cat" / "z.JPEG")
    (root / "val" / "cat" / "a.1.png").unlink()
    with pytest.raises(
        DataError,
        match=r"another packing \(new classes: owl; 1 images fewer in val \(cat/a\.1\.png\); "
        r"2 images more in train \(cat/z\.JPEG, owl/new\.png\); "
        r"1 images fewer in train \(cat/a\.0\.JPEG\)\); remove it or choose another --out",
    ):
        pack(imagefolder(root), out, progress=False)
