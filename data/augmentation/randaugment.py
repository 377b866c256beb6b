"""RandAugment in timm's notation, with draws that belong to the sample alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image


def rand_augment(
    text: str, *, size: int, mean: tuple[int, ...], bicubic: bool
) -> Callable[[Image.Image, int], Image.Image]:
    """Return a function of (RGB image, seed); `size` and `mean` (0 to 255) are as in timm.

    timm draws from Python's and numpy's global generators: both are seeded for the call and put
    back as they were.
    """
    # Imported here: it brings timm's models, and most recipes do without.
    from timm.data.auto_augment import rand_augment_transform

    resampling = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    policy: Any = rand_augment_transform(
        text,
        {
            "translate_const": int(size * 0.45),
            "img_mean": mean if len(mean) == 3 else mean[0],
            "interpolation": resampling,
        },
    )

    for operation in policy.ops:
        if operation.name.startswith("Posterize"):
            operation.level_fn = _keeping_a_bit(operation.level_fn)

    def augment(image: Image.Image, seed: int) -> Image.Image:
        python, numpy = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            return policy(image)
        finally:
            random.setstate(python)
            np.random.set_state(numpy)

    return augment


def _keeping_a_bit(level_fn: Callable[..., tuple[int]]) -> Callable[..., tuple[int]]:
    """timm's strongest posterize keeps 0 bits of a colour, which Pillow refuses from 13 on."""
    return lambda level, hparams: (max(1, level_fn(level, hparams)[0]),)
