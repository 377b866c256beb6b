"""Images that are transparent in places: what shows there is decided, never guessed."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.errors import DataError
from data.images.decode import decode
from data.packing.encoding import Encoding
from data.packing.pack import pack
from data.shards.index import SampleIndex
from data.shards.manifest import load_manifest
from data.sources.image_folder import imagefolder


def glyph(mode: str = "RGBA", form: str = "PNG") -> bytes:
    """A black square on a ground that is black too, and transparent."""
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[4:12, 4:12, 3] = 255
    image = Image.fromarray(pixels)
    stream = io.BytesIO()
    image.convert(mode).save(stream, form, lossless=True)
    return stream.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, content in {
        "rgba.png": glyph(),
        "grey.png": glyph("LA"),
        "web.webp": glyph(form="WEBP"),
    }.items():
        (tmp_path / "in" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "a" / name).write_bytes(content)
    return tmp_path / "in"


def packed(root: Path, out: Path, **options: str | int) -> list[np.ndarray]:
    encoding = Encoding(**options)  # type: ignore[arg-type]
    pack(imagefolder(root), out, encoding=encoding, progress=False)
    index = SampleIndex.load(out / "train" / "index.npz")
    content = (out / "train" / load_manifest(out / "train").shards[0].name).read_bytes()
    places = zip(index.offset.tolist(), index.size.tolist(), strict=True)
    return [np.asarray(decode(content[first : first + size], 3)) for first, size in places]


def test_without_a_word_they_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"in/a/\w+\.\w+ is transparent in places, .* --background white"
    ):
        packed(root, tmp_path / "out")
    # What was begun goes on once that is decided, for good.
    assert len(packed(root, tmp_path / "out", background="white")) == 3
    (tmp_path / "out" / "train" / "manifest.json").unlink()
    with pytest.raises(DataError, match="background: white there, black now"):
        packed(root, tmp_path / "out", background="black")


@pytest.mark.parametrize(("colour", "expected"), [("white", 255), ("#808080", 128), ("none", 0)])
def test_a_background_shows_through(root: Path, tmp_path: Path, colour: str, expected: int) -> None:
    for pixels in packed(root, tmp_path / "out", background=colour):
        assert (pixels[4:12, 4:12] == 0).all()
        assert (pixels[:4] == expected).all()


def test_scaled_images_have_it_too(root: Path, tmp_path: Path) -> None:
    for pixels in packed(root, tmp_path / "out", background="white", max_side=8):
        assert pixels.shape == (8, 8, 3) and pixels[0, 0].min() > 230


def test_an_alpha_channel_that_hides_nothing_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    image = Image.new("RGBA", (16, 16), "red")
    image.save(tmp_path / "in" / "a" / "0.png")
    original = (tmp_path / "in" / "a" / "0.png").read_bytes()
    packed(tmp_path / "in", tmp_path / "out", background="white")
    shard = tmp_path / "out" / "train" / load_manifest(tmp_path / "out" / "train").shards[0].name
    assert original in shard.read_bytes()


def test_a_background_that_is_no_colour_is_refused() -> None:
    with pytest.raises(DataError, match=r"background is 'transparent'; write a colour"):
        Encoding(background="transparent")
