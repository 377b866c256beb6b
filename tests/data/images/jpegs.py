"""JPEGs of every kind for the tests of decoding, and the pixels that Pillow gives for them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.photographs import photograph

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
