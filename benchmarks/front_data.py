"""The images of `benchmarks.front`: all of a set in memory, as a recipe's batches have them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from benchmarks.front_training import Images
from data.stream.dataset import open_split
from data.stream.pipeline import normalise
from launcher.recipe.load import load_recipe


@cache
def packed(recipe: Path) -> Images:
    """Both splits of a packed set, as the evaluation of `recipe` sees them.

    Raises DataError where the set is not packed.
    """
    config = load_recipe(recipe).data
    images, labels = [], []
    for name in ("train", "val"):
        split = open_split(config, name)
        batch = split.__getitems__(range(len(split)))
        images.append(normalise(batch["image"], split.manifest.image))
        labels.append(batch["label"])
    whole = torch.arange(sum(map(len, labels)))
    train, held_back = whole[: len(labels[0])], whole[len(labels[0]) :]
    return Images(torch.cat(images), torch.cat(labels), train, held_back, config.crop_padding)
