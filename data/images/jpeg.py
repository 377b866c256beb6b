"""JPEG bytes → pixels with libjpeg-turbo.

Without PyTorch: what looks at images, or is about to pack them, need not wait seconds for it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import simplejpeg

# Above this Pillow warns of a decompression bomb: it shall decide.
_MAX_PIXELS = 89_478_485


class Header(NamedTuple):
    """What the head of a JPEG says: size in pixels, and whether it has no colour."""

    height: int
    width: int
    grey: bool


def read_header(content: bytes) -> Header | None:
    """Return the header; None where this decoder is not the one to ask (CMYK, no JPEG, huge)."""
    if not content.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    header = Header(int(height), int(width), colours == "Gray")
    if colours not in ("YCbCr", "RGB", "Gray") or header.height * header.width > _MAX_PIXELS:
        return None
    return header


def decode_all(
    content: bytes, header: Header, buffer: np.ndarray | None = None
) -> np.ndarray | None:
    """Return RGB [H, W, 3], or grey [H, W, 1]; None if anything about the data is not sound."""
    try:
        return simplejpeg.decode_jpeg(content, "GRAY" if header.grey else "RGB", buffer=buffer)
    except ValueError:
        return None
