"""Crops of JPEGs: the pixels of the whole image, by either decoder."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sysconfig
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.images import region
from data.images.jpeg import read_header
from data.images.region import Box, RegionDecoder
from tests.data.images.jpegs import HEIGHT, KINDS, PHOTOGRAPH, WIDTH, encode, pillow

CONTENTS = {
    (kind, mode): encode(Image.fromarray(PHOTOGRAPH).convert(mode), **KINDS[kind])
    for kind in KINDS
    for mode in ("RGB", "L")
}
# With the compiled decoder, where it could be built, and without.
DECODERS = pytest.mark.parametrize("native", [True, False], ids=["compiled", "simplejpeg"])


def crop(
    content: bytes,
    box: Box,
    size: int,
    channels: int = 3,
    *,
    mirrored: bool = False,
    native: bool = True,
) -> np.ndarray:
    header = read_header(content)
    assert header is not None
    found = RegionDecoder(native).decode(content, header, box, size, channels, mirrored)
    assert found is not None
    return found[0].permute(1, 2, 0).numpy()


def test_the_compiled_decoder_is_built_where_it_can_be() -> None:
    """Else the tests here would compare simplejpeg with itself."""
    compiler = shutil.which("cc")
    headers = "#include <Python.h>\n#include <stdio.h>\n#include <jpeglib.h>\n"
    if compiler is None or not _compiles(compiler, headers):
        pytest.skip("no C compiler with the headers of Python and libjpeg-turbo (libjpeg-dev)")
    assert region.native is not None, "install again: pip install --editable ."


def _compiles(compiler: str, source: str) -> bool:
    command = [compiler, "-x", "c", "-E", "-I", sysconfig.get_path("include"), "-"]
    return subprocess.run(command, input=source.encode(), capture_output=True).returncode == 0


@DECODERS
@pytest.mark.parametrize("kind", KINDS)
def test_rows_below_a_crop_are_not_needed(kind: str, native: bool) -> None:
    content = CONTENTS[kind, "RGB"]
    whole = pillow(content)
    for bottom in (10, 16, 31, 97, 158, 159, 160, HEIGHT - 17, HEIGHT - 1, HEIGHT):
        box = Box(max(0, bottom - 40), 7, min(40, bottom), WIDTH - 7)
        expected = whole[box.top : bottom, 7:]
        assert np.array_equal(crop(content, box, 224, native=native), expected), bottom


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    top, left = draw(st.integers(0, HEIGHT - 1)), draw(st.integers(0, WIDTH - 1))
    return Box(top, left, draw(st.integers(1, HEIGHT - top)), draw(st.integers(1, WIDTH - left)))


@settings(max_examples=150, deadline=None)
@given(
    content=st.sampled_from(sorted(CONTENTS)).map(CONTENTS.__getitem__),
    box=boxes(),
    size=st.sampled_from([1, 20, 60, 1000]),
    mirrored=st.booleans(),
)
def test_both_decoders_give_the_same_pixels(
    content: bytes, box: Box, size: int, mirrored: bool
) -> None:
    compiled, plain = (
        crop(content, box, size, mirrored=mirrored, native=native) for native in (True, False)
    )
    assert np.array_equal(compiled, plain)
    if size == 1000:
        whole = pillow(content)[box.top : box.top + box.height, box.left : box.left + box.width]
        assert np.array_equal(compiled, whole[:, ::-1] if mirrored else whole)


@DECODERS
def test_a_large_crop_is_decoded_scaled(native: bool) -> None:
    content = encode(Image.fromarray(PHOTOGRAPH), quality=95)
    box = Box(40, 24, 320, 256)
    for size, eighths in ((128, 4), (64, 2), (32, 1)):
        scaled = crop(content, box, size, native=native)
        assert scaled.shape == (320 * eighths // 8, 256 * eighths // 8, 3)
        region = Image.fromarray(PHOTOGRAPH[40:360, 24:280])
        wanted = np.asarray(region.resize((scaled.shape[1], scaled.shape[0]), Image.Resampling.BOX))
        # A DCT of fewer frequencies is another low-pass filter than the mean of a box.
        assert np.abs(scaled.astype(int) - wanted.astype(int)).mean() < 6
    assert crop(content, box, 129, native=native).shape == (320, 256, 3)


@DECODERS
def test_grey_is_repeated_for_colour(native: bool) -> None:
    content = CONTENTS["4:2:0", "L"]
    colour = crop(content, Box(3, 5, 50, 60), 224, channels=3, native=native)
    assert np.array_equal(colour, pillow(content)[3:53, 5:65])
    grey = crop(content, Box(3, 5, 50, 60), 224, channels=1, native=native)
    assert np.array_equal(grey[..., 0], colour[..., 0])


@DECODERS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_a_torn_file_is_found_out_wherever_the_crop_lies(
    kind: str, kept: float, native: bool
) -> None:
    content = CONTENTS[kind, "RGB"]
    torn = content[: int(len(content) * kept)]
    header = read_header(torn)
    assert header is not None
    for box in (Box(0, 0, 20, 20), Box(HEIGHT - 20, 0, 20, WIDTH), Box(0, 0, HEIGHT, WIDTH)):
        assert RegionDecoder(native).decode(torn, header, box, 224, 3) is None


@DECODERS
def test_damage_inside_the_data_is_left_to_pillow(native: bool) -> None:
    content = bytearray(encode(Image.fromarray(PHOTOGRAPH), quality=95))
    middle = len(content) // 2
    content[middle : middle + 300] = bytes(300)
    damaged = bytes(content)
    header = read_header(damaged)
    assert header is not None
    whole = Box(0, 0, HEIGHT, WIDTH)
    assert RegionDecoder(native).decode(damaged, header, whole, 224, 3) is None


def test_what_the_compiled_decoder_cannot_do_it_refuses() -> None:
    native: Any = region.native
    if native is None:
        pytest.skip("the compiled decoder is not built")
    content, room = CONTENTS["4:2:0", "RGB"], np.zeros(HEIGHT * WIDTH * 3, np.uint8)
    assert native.crop(content, 0, 0, HEIGHT, WIDTH, 8, False, False, room)
    for box in ((0, 0, HEIGHT + 1, WIDTH), (1, 0, HEIGHT, WIDTH), (0, 9, 9, WIDTH), (0, 0, 0, 9)):
        assert not native.crop(content, *box, 8, False, False, room)
    assert not native.crop(content, 0, 0, HEIGHT, WIDTH, 8, False, False, room[:-1])
    cmyk = encode(Image.fromarray(PHOTOGRAPH).convert("CMYK"))
    for other in (b"", b"no JPEG", cmyk):
        assert not native.crop(other, 0, 0, 9, 9, 8, False, False, room)


@DECODERS
def test_a_decoder_travels_without_its_buffer(native: bool) -> None:
    decoder = RegionDecoder(native)
    content = CONTENTS["4:2:0", "RGB"]
    header = read_header(content)
    assert header is not None
    first = decoder.decode(content, header, Box(0, 0, HEIGHT, WIDTH), 224, 3)
    second = pickle.loads(pickle.dumps(decoder))
    assert len(pickle.dumps(decoder)) < 4000
    again = second.decode(content, header, Box(0, 0, HEIGHT, WIDTH), 224, 3)
    assert first is not None and torch.equal(first, again)
