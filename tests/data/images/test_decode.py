"""Decoding whole images: the pixels that Pillow gives, whatever the file."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data.images.decode import CorruptImage, decode
from data.images.jpeg import read_header
from tests.data.images.jpegs import HEIGHT, KINDS, PHOTOGRAPH, WIDTH, encode, pillow


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", KINDS)
def test_jpegs_have_the_pixels_of_pillow(kind: str, mode: str) -> None:
    content = encode(Image.fromarray(PHOTOGRAPH).convert(mode), **KINDS[kind])
    for channels, wanted in ((3, "RGB"), (1, "L")):
        assert np.array_equal(np.asarray(decode(content, channels)), pillow(content, wanted))
    assert decode(content).mode == ("L" if mode == "L" else "RGB")


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_truncated_jpegs_are_corrupt(kept: float) -> None:
    content = encode(Image.fromarray(PHOTOGRAPH), quality=95)
    torn = content[: int(len(content) * kept)]
    with pytest.raises(CorruptImage, match="truncated"):
        decode(torn)


def test_damage_inside_the_data_is_left_to_pillow() -> None:
    content = bytearray(encode(Image.fromarray(PHOTOGRAPH), quality=95))
    middle = len(content) // 2
    content[middle : middle + 300] = bytes(300)
    damaged = bytes(content)
    assert np.array_equal(np.asarray(decode(damaged)), pillow(damaged))


@pytest.mark.parametrize("content", [b"", b"\xff\xd8", b"no image", b"\x89PNG\r\n\x1a\nshort"])
def test_what_is_no_image_is_corrupt(content: bytes) -> None:
    assert read_header(content) is None
    with pytest.raises(CorruptImage):
        decode(content)


def test_16_bits_become_the_upper_8() -> None:
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    content = encode(Image.fromarray(levels), "PNG")
    assert Image.open(io.BytesIO(content)).mode.startswith("I")
    assert np.array_equal(np.asarray(decode(content)), levels >> 8)
    assert np.array_equal(np.asarray(decode(content, 3))[..., 2], levels >> 8)


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert np.asarray(decode(content))[0, 0].tolist() == [255, 0, 0]


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(Image.fromarray(PHOTOGRAPH), exif=exif)
    assert decode(content).size == (WIDTH, HEIGHT)
    assert np.array_equal(np.asarray(decode(content)), pillow(content))
