"""Photograph-like JPEGs with the sizes of ImageNet's, for machines that have no ImageNet.

Noise with the spectrum of natural images (amplitude falls as 1/f), cut by a few straight edges
between regions of different brightness, weakly coloured. Dimensions are drawn so that the mean is
about 400×350; at this JPEG quality a pixel takes about 0.75 bytes, so that a file has about
100 KB, in ImageNet's training set 110. All of it is a function of the number of the image.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

QUALITY = 95
CLASSES = 10
# Long and short sides; the commonest in ImageNet is 500×375, thumbnails pull the mean down.
_SIDES = ((500, 375), (500, 333), (400, 300), (640, 480), (320, 240), (256, 256), (300, 225))
_WEIGHTS = (0.34, 0.16, 0.1, 0.06, 0.12, 0.12, 0.1)


def photograph(number: int) -> np.ndarray:
    """Pixels of image `number`, uint8 [height, width, 3]."""
    rng = np.random.default_rng(number)
    long, short = _SIDES[rng.choice(len(_SIDES), p=_WEIGHTS)]
    height, width = (short, long) if rng.random() < 0.7 else (long, short)
    luma = _pink_noise(rng, height, width) + _regions(rng, height, width)
    chroma = [_pink_noise(rng, height, width, steeper=0.4) for _ in range(2)]
    blue, red = (0.5 * plane / plane.std() for plane in chroma)
    luma = luma / luma.std()
    channels = np.stack([luma + red, luma - 0.3 * (red + blue), luma + blue], axis=-1)
    return np.clip(118 + 48 * channels, 0, 255).astype(np.uint8)


def jpeg(number: int) -> bytes:
    """Image `number` as a JPEG file."""
    stream = io.BytesIO()
    Image.fromarray(photograph(number)).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def write_class_folders(folder: Path, distinct: int, times: int) -> None:
    """Write JPEGs as folder/train/<class>/<number>.jpg, for `scl pack`; each image `times` over."""
    for number in range(distinct):
        content = jpeg(number)
        for copy in range(times):
            name = f"{copy * distinct + number:06d}.jpg"
            path = folder / "train" / f"class{number % CLASSES}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _pink_noise(
    rng: np.random.Generator, height: int, width: int, steeper: float = 0.0
) -> np.ndarray:
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency ** (1 + steeper)
    noise = np.fft.irfft2(spectrum, (height, width))
    return noise / noise.std()


def _regions(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Sum of half planes: straight edges as sharp as a lens leaves them."""
    y, x = np.mgrid[:height, :width]
    total = np.zeros((height, width))
    for angle, shift, step in _edges(rng):
        distance = (x / width - 0.5) * np.cos(angle) + (y / height - 0.5) * np.sin(angle) - shift
        total += step * np.clip(distance * min(height, width) / 1.5, -1, 1)
    return total


def _edges(rng: np.random.Generator) -> Iterator[tuple[float, float, float]]:
    for _ in range(rng.integers(3, 8)):
        yield rng.uniform(0, np.pi), rng.uniform(-0.35, 0.35), rng.normal(0, 0.5)
