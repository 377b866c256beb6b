"""The images by which units are judged: from the training split, as evaluation shows them."""

from __future__ import annotations

from pydantic import ValidationError
from torch import Tensor

from data.config import DataConfig
from data.errors import DataError
from data.stream.pipeline import eval_stream, normalise, open_split
from launcher.errors import UsageError
from launcher.export.source import Source

Samples = list[tuple[Tensor, Tensor]]
"""Batches of normalised images [n, channels, height, width] and labels [n]."""


def training_samples(source: Source, data: str | None, count: int) -> Samples:
    """The first `count` sound samples of the training split that `data` or the recipe names.

    Packing has shuffled them. Raises UsageError where there is none.
    """
    values = dict((source.recipe or {}).get("data") or {})
    if data is not None:
        values["path"] = data
    if not values.get("path"):
        raise UsageError(
            f"units are judged by images, and {source.file} names none: give shards with --data"
        )
    values = {"image_size": source.network.image_size} | values
    # Some hundred images need no workers, which would outlive the first of them.
    values["workers"] = 0
    try:
        config = DataConfig.model_validate(values)
        dataset = open_split(config, "train")
    except (ValidationError, DataError) as error:
        raise UsageError(
            f"{values['path']} cannot be read: {' '.join(str(error).split())}; name the shards "
            "that units are to be judged by with --data"
        ) from error
    found: Samples = []
    left = count
    for batch in eval_stream(dataset, config):
        sound = (batch["valid"] & (batch["corrupt"] == 0)).nonzero().flatten()[:left]
        found.append(
            (normalise(batch["image"][sound], dataset.manifest.image), batch["label"][sound])
        )
        left -= len(sound)
        if left <= 0:
            break
    return found
