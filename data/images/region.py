"""Of a JPEG no more pixels than a crop needs, with libjpeg-turbo.

Two ways lead to the same pixels: _crop.c beside it, where it could be built (setup.py), and
simplejpeg, which is always there, decodes whole rows, and is asked again wherever the first finds
fault.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch

from data.images.jpeg import Header, decode_all

try:
    from data.images import _crop as native
except ImportError:
    native = None

# Luma rows that share one row of blocks; a decoder makes them all or none.
_BLOCK_ROWS = 16
# Chroma of half the height is interpolated with the row below.
_CONTEXT_ROWS = 2
_BASELINE = {0xC0, 0xC1}
_NO_FRAME = {0xC4, 0xC8, 0xCC}
# What libjpeg says first when all rows asked for were sound and more data follow them, to the end
# of the image: behind a restart marker, the file might be torn.
_ONLY_MORE_DATA = re.compile(r"Corrupt JPEG data: \d+ extraneous bytes before marker 0xd9$")


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


class RegionDecoder:
    """Decodes as little as a crop needs: not the rows below it, and scaled where that is enough.

    Keeps a buffer between calls: what `decode` returns is valid until the next one. With
    `native` off, it does as where the compiled decoder could not be built.
    """

    def __init__(self, native: bool = True) -> None:
        self._native = native
        self._tensor = torch.empty(0, dtype=torch.uint8)
        self._array = self._tensor.numpy()

    def __reduce__(self) -> tuple[type[RegionDecoder], tuple[bool]]:
        return RegionDecoder, (self._native,)

    def decode(
        self,
        content: bytes,
        header: Header,
        box: Box,
        size: int,
        channels: int,
        mirrored: bool = False,
    ) -> torch.Tensor | None:
        """Return the crop `box`, uint8 [1, channels, h, w]; grey is repeated for 3 channels.

        Its pixels are those of the whole image decoded; or of it at half, a quarter or an eighth
        of its size where the crop is then still at least `size` high and wide. None if anything
        about the data is not sound.
        """
        eighths = _eighths(box, size)
        if eighths < 8:
            box = _scaled(box, eighths)
        depth = 1 if header.grey else 3
        first, width = 0, box.width
        is_done = self._decode_box(content, header, box, eighths, mirrored)
        if not is_done:
            pixels = self._decode_more(content, header, box, eighths)
            if pixels is None:
                return None
            width = pixels.shape[1]
            first = box.top * width + box.left
        # One view instead of a chain of slices and permutations, each of which takes its time.
        strides = (box.height * width * depth, depth // channels, width * depth, depth)
        crop = self._tensor.as_strided((1, channels, box.height, box.width), strides, first * depth)
        return crop.flip(3) if mirrored and not is_done else crop

    def _decode_box(
        self, content: bytes, header: Header, box: Box, eighths: int, mirrored: bool
    ) -> bool:
        """Whether the compiled decoder is there and the buffer begins with the crop."""
        if native is None or not self._native:
            return False
        room = self._room_for((box.height, box.width, 1 if header.grey else 3))
        return native.crop(content, *box, eighths, header.grey, mirrored, room)

    def _decode_more(
        self, content: bytes, header: Header, box: Box, eighths: int
    ) -> np.ndarray | None:
        """All columns, from the top; [H, W, C] in the buffer."""
        if eighths < 8:
            return self._decode_scaled(content, header, eighths)
        rows = -(-(box.top + box.height + _CONTEXT_ROWS) // _BLOCK_ROWS) * _BLOCK_ROWS
        return self._decode_rows(content, header, min(header.height, rows))

    def _decode_rows(self, content: bytes, header: Header, rows: int) -> np.ndarray | None:
        shape = (rows, header.width, 1 if header.grey else 3)
        colours = "GRAY" if header.grey else "RGB"
        field = _height_field(content, header) if rows < header.height else None
        if field is None:
            return self._decode_all(content, header)
        buffer = self._room_for(shape)
        shorter = bytearray(content)
        shorter[field : field + 2] = rows.to_bytes(2, "big")
        try:
            return simplejpeg.decode_jpeg(shorter, colours, buffer=buffer)
        except ValueError as error:
            if _ONLY_MORE_DATA.match(str(error)):
                return buffer.reshape(shape)
        return self._decode_all(content, header)

    def _decode_all(self, content: bytes, header: Header) -> np.ndarray | None:
        buffer = self._room_for((header.height, header.width, 1 if header.grey else 3))
        return decode_all(content, header, buffer)

    def _decode_scaled(self, content: bytes, header: Header, eighths: int) -> np.ndarray | None:
        height, width = (-(-side * eighths // 8) for side in header[:2])
        try:
            return simplejpeg.decode_jpeg(
                content,
                "GRAY" if header.grey else "RGB",
                min_height=height,
                min_width=width,
                min_factor=8 / eighths,
                buffer=self._room_for((height, width, 1 if header.grey else 3)),
            )
        except ValueError:
            return None

    def _room_for(self, shape: tuple[int, ...]) -> np.ndarray:
        # Fresh memory for each image would be mapped, and zeroed, page by page.
        size = shape[0] * shape[1] * shape[2]
        if self._array.size < size:
            self._tensor = torch.empty(2 * size, dtype=torch.uint8)
            self._array = self._tensor.numpy()
        return self._array[:size]


def _scaled(box: Box, eighths: int) -> Box:
    """The same part of an image of so many eighths of its size."""
    top, left = box.top * eighths // 8, box.left * eighths // 8
    bottom = -(-(box.top + box.height) * eighths // 8)
    right = -(-(box.left + box.width) * eighths // 8)
    return Box(top, left, bottom - top, right - left)


def _eighths(box: Box, size: int) -> int:
    """The smallest scale in eighths at which the crop is no smaller than the output.

    Only powers of two: the others have no SIMD and take longer than all the pixels.
    """
    for eighths in (1, 2, 4):
        if min(box.height, box.width) * eighths >= 8 * size:
            return eighths
    return 8


def _height_field(content: bytes, header: Header) -> int | None:
    """Where the image's height stands in a sequential JPEG; None for any other kind.

    A decoder told of fewer rows stops after them, and what it has made until then is the same.
    """
    size = header.height.to_bytes(2, "big") + header.width.to_bytes(2, "big")
    position = 2
    while position + 9 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker in _BASELINE:
            return position + 5 if content[position + 5 : position + 9] == size else None
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
            return None
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return None
