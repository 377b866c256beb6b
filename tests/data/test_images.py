"""Decoding: the pixels Pillow gives, whatever the file; never more than a crop needs."""

import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.photographs import photograph
from data.images import CorruptImage, decode
from data.jpeg import Box, RegionDecoder, read_header

PHOTOGRAPH = photograph(1)
HEIGHT, WIDTH, _ = PHOTOGRAPH.shape
KINDS: dict[str, dict[str, Any]] = {
    "4:2:0": {},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_rows": 1},
    "stored as RGB": {"keep_rgb": True},
    "coarse": {"quality": 20},
}


def encode(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def pillow(content: bytes, mode: str = "RGB") -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert(mode))


def crop(content: bytes, box: Box, size: int, channels: int = 3) -> np.ndarray:
    header = read_header(content)
    assert header is not None
    found = RegionDecoder().decode(content, header, box, size, channels)
    assert found is not None
    return found[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", KINDS)
def test_jpegs_have_the_pixels_of_pillow(kind: str, mode: str) -> None:
    content = encode(Image.fromarray(PHOTOGRAPH).convert(mode), **KINDS[kind])
    for channels, wanted in ((3, "RGB"), (1, "L")):
        assert np.array_equal(np.asarray(decode(content, channels)), pillow(content, wanted))
    assert decode(content).mode == ("L" if mode == "L" else "RGB")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_below_a_crop_are_not_needed(kind: str) -> None:
    content = encode(Image.fromarray(PHOTOGRAPH), **KINDS[kind])
    whole = pillow(content)
    for bottom in (10, 16, 31, 97, 158, 159, 160, HEIGHT - 17, HEIGHT - 1, HEIGHT):
        box = Box(max(0, bottom - 40), 7, min(40, bottom), WIDTH - 7)
        expected = whole[box.top : bottom, 7:]
        assert np.array_equal(crop(content, box, size=224), expected), bottom


def test_a_large_crop_is_decoded_scaled() -> None:
    content = encode(Image.fromarray(PHOTOGRAPH), quality=95)
    box = Box(40, 24, 320, 256)
    for size, eighths in ((128, 4), (64, 2), (32, 1)):
        scaled = crop(content, box, size)
        assert scaled.shape == (320 * eighths // 8, 256 * eighths // 8, 3)
        region = Image.fromarray(PHOTOGRAPH[40:360, 24:280])
        wanted = np.asarray(region.resize((scaled.shape[1], scaled.shape[0]), Image.Resampling.BOX))
        # A DCT of fewer frequencies is another low-pass filter than the mean of a box.
        assert np.abs(scaled.astype(int) - wanted.astype(int)).mean() < 6
    assert crop(content, box, 129).shape == (320, 256, 3)


def test_grey_is_repeated_for_colour() -> None:
    content = encode(Image.fromarray(PHOTOGRAPH).convert("L"))
    colour = crop(content, Box(3, 5, 50, 60), 224, channels=3)
    assert np.array_equal(colour, pillow(content)[3:53, 5:65])
    grey = crop(content, Box(3, 5, 50, 60), 224, channels=1)
    assert np.array_equal(grey[..., 0], colour[..., 0])


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_truncated_jpegs_are_corrupt_wherever_the_crop_lies(kept: float) -> None:
    content = encode(Image.fromarray(PHOTOGRAPH), quality=95)
    torn = content[: int(len(content) * kept)]
    with pytest.raises(CorruptImage, match="truncated"):
        decode(torn)
    header = read_header(torn)
    assert header is not None
    assert RegionDecoder().decode(torn, header, Box(0, 0, 20, 20), 224, 3) is None


def test_damage_inside_the_data_is_left_to_pillow() -> None:
    content = bytearray(encode(Image.fromarray(PHOTOGRAPH), quality=95))
    middle = len(content) // 2
    content[middle : middle + 300] = bytes(300)
    damaged = bytes(content)
    assert np.array_equal(np.asarray(decode(damaged)), pillow(damaged))
    header = read_header(damaged)
    assert header is not None
    assert RegionDecoder().decode(damaged, header, Box(0, 0, HEIGHT, WIDTH), 224, 3) is None


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


def test_a_decoder_travels_without_its_buffer() -> None:
    decoder = RegionDecoder()
    content = encode(Image.fromarray(PHOTOGRAPH))
    header = read_header(content)
    assert header is not None
    first = decoder.decode(content, header, Box(0, 0, HEIGHT, WIDTH), 224, 3)
    second = pickle.loads(pickle.dumps(decoder))
    assert len(pickle.dumps(decoder)) < 4000
    again = second.decode(content, header, Box(0, 0, HEIGHT, WIDTH), 224, 3)
    assert first is not None and torch.equal(first, again)
