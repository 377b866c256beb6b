"""Which images of a folder a run is evaluated on."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.config import DataConfig
from data.shards.manifest import ImageStats
from launcher.errors import UsageError
from launcher.evaluation.samples import Known, open_samples

KNOWN = Known(
    ["cat", "dog"],
    ["cat", "dog"],
    ImageStats(channels=3, mean=[0.5] * 3, std=[0.2] * 3, measured_on=1),
)


def image(seed: int, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def config(path: Path) -> DataConfig:
    return DataConfig(path=path, image_size=8, eval_crop_ratio=1.0)


def test_what_others_leave_between_images_is_not_evaluated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for k, name in enumerate(["cat/0.png", "cat/1.bmp", "dog/0.jfif"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(image(k, ("PNG", "BMP", "JPEG")[k]))
    (tmp_path / "cat" / "._0.png").write_bytes(b"resource fork")
    for folder in (tmp_path, tmp_path / "dog"):
        (folder / ".ipynb_checkpoints").mkdir()
        (folder / ".ipynb_checkpoints" / "0-checkpoint.png").write_bytes(image(0))
    (tmp_path / "dog" / "itself").symlink_to(tmp_path / "dog")
    (tmp_path / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with caplog.at_level(logging.WARNING, "data"):
        samples = open_samples(config(tmp_path), KNOWN, "val")
    batch = next(samples.batches)
    assert samples.count == 3
    assert batch["label"].tolist() == [0, 0, 1]
    assert not torch.as_tensor(batch["corrupt"]).any()
    assert "left out 1 links that lead nowhere: dog/gone.png" in caplog.text


def test_a_split_that_was_not_packed_is_named_with_those_that_were(shards: Path) -> None:
    with pytest.raises(
        UsageError, match=r"has no split 'test': it has train and val; choose one with --split"
    ):
        open_samples(config(shards), KNOWN, "test")
