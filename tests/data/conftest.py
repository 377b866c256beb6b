"""Packed sets shared by the tests of the data room."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.packing.pack import pack
from data.sources.digits import digits

MakeTar = Callable[[Path, list[tuple[str, bytes]]], Path]
MakeFolder = Callable[..., Path]


@pytest.fixture(scope="session")
def packed_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, packed once; tests must not write here."""
    out = tmp_path_factory.mktemp("digits")
    pack(digits(), out, progress=False)
    return out


@pytest.fixture
def make_tar() -> MakeTar:
    def make(path: Path, members: list[tuple[str, bytes]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    return make


def image_bytes(seed: int, form: str = "PNG", side: int = 12, mode: str = "RGB") -> bytes:
    rng = np.random.default_rng(seed)
    shape = (side, side + 4, 3) if mode == "RGB" else (side, side + 4)
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(stream, format=form)
    return stream.getvalue()


@pytest.fixture(name="image_bytes")
def image_bytes_fixture() -> Callable[..., bytes]:
    return image_bytes


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Image folders: ``make_folder({"train/cat": 3, "val/cat": 1})``."""

    def make(counts: dict[str, int], root: Path = tmp_path / "raw") -> Path:
        seed = 0
        for name, count in counts.items():
            (root / name).mkdir(parents=True)
            for k in range(count):
                suffix, form = (("JPEG", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))[k % 3]
                (root / name / f"a.{k}.{suffix}").write_bytes(image_bytes(seed, form))
                seed += 1
        return root

    return make
