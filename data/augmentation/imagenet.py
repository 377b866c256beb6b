"""The augmentation of ImageNet training: random crop and shape, flip, RandAugment, erasing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from data.augmentation.randaugment import rand_augment
from data.config import DataConfig
from data.images.decode import decode
from data.images.jpeg import read_header
from data.images.region import Box, RegionDecoder
from data.shards.manifest import ImageStats

_ATTEMPTS = 10
# Zhong et al. 2017 (arXiv 1708.04896), as timm has it: shares of the image's area, height / width.
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_SHAPE = (0.3, 1 / 0.3)
_RESIZE = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
}


Draw = Callable[[], float]


class ImagenetAugmentation:
    """Bytes → pixels of `size`², as torchvision's RandomResizedCrop makes them.

    The crop is drawn first, so that no more is decoded than it needs, and is resized straight
    into the batch. All draws come from one generator, seeded for each sample.
    """

    def __init__(self, config: DataConfig, size: int, stats: ImageStats) -> None:
        self._config = config
        self._size = size
        self._channels = stats.channels
        self._mean = np.array([round(255 * mean) for mean in stats.mean], np.uint8)
        self._resize = _RESIZE[config.interpolation]
        self._decoder = RegionDecoder()
        self._policy = None
        if config.randaugment is not None:
            self._policy = rand_augment(
                config.randaugment,
                size=size,
                mean=tuple(self._mean.tolist()),
                bicubic=config.interpolation == "bicubic",
            )

    def __call__(self, content: bytes, seed: int, out: torch.Tensor) -> None:
        """Write uint8 [size, size, channels] to `out`, contiguous.

        Raises CorruptImage where the bytes cannot be decoded.
        """
        # Python keeps what random() returns for a seed the same in all its versions.
        draw = random.Random(seed).random
        crop = self._crop(content, draw)
        # The resizing kernel writes channels last in place, without a copy.
        target = out.unsqueeze(0).permute(0, 3, 1, 2)
        self._resize(crop, [self._size] * 2, False, None, None, out=target)
        if self._policy is not None:
            self._apply_policy(out.numpy(), int(draw() * 2**53))
        if self._config.random_erasing and draw() < self._config.random_erasing:
            box = random_erasing_box(self._size, draw)
            if box is not None:
                rows, columns = (box.top, box.top + box.height), (box.left, box.left + box.width)
                out.numpy()[slice(*rows), slice(*columns)] = self._mean

    def _crop(self, content: bytes, draw: Draw) -> torch.Tensor:
        """The crop before it is resized, mirrored or not, uint8 [1, C, h, w].

        Valid until the next call.
        """
        header = read_header(content)
        if header is None or (self._channels == 1 and not header.grey):
            image = decode(content, self._channels)
            box, mirrored = self._draw_crop(image.height, image.width, draw)
        else:
            box, mirrored = self._draw_crop(header.height, header.width, draw)
            crop = self._decoder.decode(content, header, box, self._size, self._channels, mirrored)
            if crop is not None:
                return crop
            image = decode(content, self._channels)
        left, top = box.left, box.top
        cut = np.array(image.crop((left, top, left + box.width, top + box.height)))
        whole = torch.from_numpy(cut.reshape(1, box.height, box.width, self._channels))
        return (whole.flip(2) if mirrored else whole).permute(0, 3, 1, 2)

    def _draw_crop(self, height: int, width: int, draw: Draw) -> tuple[Box, bool]:
        """The box of the image, and whether it is mirrored: the same as mirroring the result."""
        box = random_crop_box(height, width, self._config.crop_scale, self._config.crop_ratio, draw)
        return box, self._config.hflip and draw() < 0.5

    def _apply_policy(self, pixels: np.ndarray, seed: int) -> None:
        assert self._policy is not None
        image = Image.fromarray(pixels[..., 0] if self._channels == 1 else pixels)
        pixels[:] = np.asarray(self._policy(image, seed)).reshape(pixels.shape)


def random_crop_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draw: Draw,
) -> Box:
    """Draw a crop as torchvision's RandomResizedCrop does: `draw` gives numbers in [0, 1)."""
    area = height * width
    for _ in range(_ATTEMPTS):
        box = _random_box(height, width, area, scale, ratio, draw)
        if box is not None:
            return box
    # Nothing fitted: the middle, as wide or as high as the shapes allow.
    shape = min(max(width / height, ratio[0]), ratio[1])
    box_height, box_width = height, width
    if width / height < shape:
        box_height = min(height, round(width / shape))
    else:
        box_width = min(width, round(height * shape))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def random_erasing_box(size: int, draw: Draw) -> Box | None:
    """Draw the rectangle to erase from a square of `size`; None if none fitted."""
    for _ in range(_ATTEMPTS):
        box = _random_box(size, size, size * size, _ERASED_AREA, _ERASED_SHAPE, draw)
        if box is not None:
            return box
    return None


def _random_box(
    height: int,
    width: int,
    area: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draw: Draw,
) -> Box | None:
    target = area * (scale[0] + (scale[1] - scale[0]) * draw())
    low, high = math.log(ratio[0]), math.log(ratio[1])
    shape = math.exp(low + (high - low) * draw())
    box_width, box_height = round(math.sqrt(target * shape)), round(math.sqrt(target / shape))
    if not (0 < box_width <= width and 0 < box_height <= height):
        return None
    top = int(draw() * (height - box_height + 1))
    left = int(draw() * (width - box_width + 1))
    return Box(top, left, box_height, box_width)
