"""Progressive resizing: the size as a function of the epoch, and batches that follow it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from data.config import DataConfig
from data.stream.pipeline import eval_stream, open_split, train_stream
from data.stream.plan import BatchPlan


def config(path: Path = Path(), size: int = 224, **progressive: Any) -> DataConfig:
    return DataConfig(path=path, image_size=size, eval_crop_ratio=1.0, progressive=progressive)  # type: ignore[arg-type]


def test_sizes_of_a_run() -> None:
    cfg = config(start=128)
    sizes = [cfg.training_size(epoch, 100) for epoch in range(100)]
    assert sizes[0] == 128 and sizes[80:] == [224] * 20
    assert sizes == sorted(sizes) and set(sizes) == {128, 160, 192, 224}
    # Half-way up, at 40 of 80 epochs, 176 lies between two steps and goes to the upper.
    assert (sizes[39], sizes[40]) == (160, 192)
    assert cfg.smallest_training_size == 128


def test_sizes_at_the_ends() -> None:
    cfg = config(start=100, until=0.5, step=64)
    assert [cfg.training_size(epoch, 8) for epoch in range(8)] == [100, 100, 164, 164] + [224] * 4
    assert config(start=224).training_size(0, 1) == 224
    plain = DataConfig(path=Path(), image_size=224)
    assert plain.training_size(0, 10) == plain.smallest_training_size == 224


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"start": 256}, "progressive.start 256 is above image_size 224"),
        ({"start": 0}, "start"),
        ({"start": 128, "until": 0}, "until"),
        ({"start": 128, "step": 0}, "step"),
        ({"start": 128, "pace": 2}, "pace"),
    ],
)
def test_nonsense_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        config(**options)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_have_the_size_of_their_epoch_and_resume_in_it(
    packed_digits: Path, workers: int
) -> None:
    cfg = config(packed_digits, 8, start=4, until=1.0, step=2)
    cfg = cfg.model_copy(update={"workers": workers, "augment": "crop"})
    dataset = open_split(cfg, "train")
    plan = BatchPlan(dataset.shard_sizes, 0, 400)
    stream = list(train_stream(dataset, plan, cfg, epochs=4))
    sizes = [batch["image"].shape[-1] for batch in stream]
    assert sizes == [4] * 3 + [6] * 6 + [8] * 3
    resumed = list(train_stream(dataset, plan, cfg, start_epoch=1, start_step=2, epochs=4))
    assert len(resumed) == len(stream) - 5
    for ours, theirs in zip(resumed, stream[5:], strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    evaluated = eval_stream(open_split(cfg, "val"), cfg)
    assert {batch["image"].shape[-1] for batch in evaluated} == {8}
