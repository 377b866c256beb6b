"""Steps from image to image: those of torchvision, pixel for pixel and draw for draw.

Importing torchvision takes a second and 100 MiB in each data worker, for what Pillow does in a
call. Random steps draw from torch's global CPU generator, as torchvision's do.
"""

from __future__ import annotations

import torch
from PIL import Image

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class Centre:
    """Scale the shorter side to size / ratio and take the centre square of `size`; ratio ≤ 1."""

    def __init__(self, size: int, ratio: float, interpolation: str) -> None:
        self._size = size
        self._shorter = round(size / ratio)
        self._resampling = _RESAMPLING[interpolation]

    def __call__(self, image: Image.Image) -> Image.Image:
        shortest = min(image.size)
        if shortest != self._shorter:
            width, height = (
                self._shorter if side == shortest else int(self._shorter * side / shortest)
                for side in image.size
            )
            image = image.resize((width, height), self._resampling)
        if image.size != (self._size, self._size):
            left, top = (round((side - self._size) / 2) for side in image.size)
            image = image.crop((left, top, left + self._size, top + self._size))
        return image


class RandomCrop:
    """Put `padding` zeros around a square image of `size`, and take as large a square at random."""

    def __init__(self, size: int, padding: int) -> None:
        self._size = size
        self._padding = padding

    def __call__(self, image: Image.Image) -> Image.Image:
        top, left = (self._draw() for _ in range(2))
        # What lies outside the image is zeros to Pillow.
        return image.crop((left, top, left + self._size, top + self._size))

    def _draw(self) -> int:
        if not self._padding:
            return 0
        return int(torch.randint(0, 2 * self._padding + 1, size=())) - self._padding


def maybe_mirrored(image: Image.Image) -> Image.Image:
    """Mirror the image left to right, half of the time."""
    if torch.rand(1) >= 0.5:
        return image
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
