"""From image bytes to uint8 pixels in a batch, with randomness that belongs to the sample alone."""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image

from data.augmentation.imagenet import ImagenetAugmentation
from data.augmentation.steps import Centre, RandomCrop, maybe_mirrored
from data.config import DataConfig
from data.images.decode import decode
from data.shards.manifest import ImageStats

# (bytes of an image, seed, uint8 [size, size, channels] to write to); raises CorruptImage.
Transform = Callable[[bytes, int, torch.Tensor], None]


class _Chain:
    """Decoding, then steps from image to image that draw from torch's global CPU generator."""

    def __init__(
        self, channels: int, steps: list[Callable[[Image.Image], Image.Image]], *, draws: bool
    ) -> None:
        self._channels = channels
        self._steps = steps
        self._draws = draws

    def __call__(self, content: bytes, seed: int, out: torch.Tensor) -> None:
        image = decode(content, self._channels)
        with seeded(seed) if self._draws else contextlib.nullcontext():
            for step in self._steps:
                image = step(image)
        np.copyto(out.numpy(), np.asarray(image).reshape(out.shape))


def modules_for(config: DataConfig) -> list[str]:
    """The modules that training with `config` imports when it is first used, for some are large."""
    needed = {"timm.data.auto_augment": config.randaugment, "scipy.special": config.mixing}
    return [module for module, is_needed in needed.items() if is_needed]


def eval_transform(config: DataConfig, stats: ImageStats) -> Transform:
    """Scale the shorter side, take the centre square of `image_size`."""
    centre = Centre(config.image_size, config.eval_crop_ratio, config.interpolation)
    return _Chain(stats.channels, [centre], draws=False)


def train_transform(config: DataConfig, size: int, stats: ImageStats) -> Transform:
    """Return the augmentation of the recipe for images of `size`."""
    return _AUGMENTATIONS[config.augment](config, size, stats)


def _none(config: DataConfig, size: int, stats: ImageStats) -> Transform:
    centre = Centre(size, config.eval_crop_ratio, config.interpolation)
    return _Chain(stats.channels, [centre, *_flip(config)], draws=config.hflip)


def _crop(config: DataConfig, size: int, stats: ImageStats) -> Transform:
    steps = [
        Centre(size, 1.0, config.interpolation),
        RandomCrop(size, config.crop_padding),
        *_flip(config),
    ]
    return _Chain(stats.channels, steps, draws=True)


def _flip(config: DataConfig) -> list[Callable[[Image.Image], Image.Image]]:
    return [maybe_mirrored] if config.hflip else []


_AUGMENTATIONS: dict[str, Callable[[DataConfig, int, ImageStats], Transform]] = {
    "none": _none,
    "crop": _crop,
    "imagenet": ImagenetAugmentation,
}


def sample_seed(seed: int, epoch: int, sample: int) -> int:
    """Mix three integers to 64 bits: equal inputs, equal seed, on any machine."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, epoch, sample), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator for the block, and put it back as it was."""
    # torch.manual_seed would reseed the GPUs too.
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
