"""From a decoded image to uint8 [C, H, W], with randomness that belongs to the sample alone."""

import contextlib
import hashlib
import struct
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from data.config import DataConfig

Transform = Callable[[Image.Image], torch.Tensor]


class _Centre:
    """Scale the shorter side to size / ratio and take the centre square of ``size``."""

    def __init__(self, size: int, ratio: float) -> None:
        self.size = size
        self.shorter = round(size / ratio)
        self._resize = v2.Resize([self.shorter], antialias=True)
        self._crop = v2.CenterCrop(size)

    def __call__(self, image: Image.Image) -> Image.Image:
        # Small sets come in the right size; torchvision's no-ops would cost as much as decoding.
        if min(image.size) != self.shorter:
            image = self._resize(image)
        if image.size != (self.size, self.size):
            image = self._crop(image)
        return image


class _Chain:
    """Steps from image to image, then to a tensor; a lean v2.Compose."""

    def __init__(self, *steps: Callable[[Image.Image], Image.Image]) -> None:
        self.steps = steps

    def __call__(self, image: Image.Image) -> torch.Tensor:
        for step in self.steps:
            image = step(image)
        pixels = torch.from_numpy(np.array(image))
        return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def eval_transform(config: DataConfig) -> Transform:
    """Scale the shorter side, take the centre square of ``image_size``."""
    return _Chain(_Centre(config.image_size, config.eval_crop_ratio))


def train_transform(config: DataConfig) -> Transform:
    """Return the augmentation of the recipe; it draws from torch's global CPU generator."""
    steps: list[Callable[[Image.Image], Image.Image]]
    if config.augment == "imagenet":
        steps = [v2.RandomResizedCrop(config.image_size, antialias=True)]
    elif config.augment == "crop":
        steps = [
            _Centre(config.image_size, 1.0),
            v2.RandomCrop(config.image_size, padding=config.crop_padding),
        ]
    else:
        steps = [_Centre(config.image_size, config.eval_crop_ratio)]
    if config.hflip:
        steps.append(v2.RandomHorizontalFlip())
    return _Chain(*steps)


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
