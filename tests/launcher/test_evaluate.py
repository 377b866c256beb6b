"""Evaluation on its own: exactly once, and the same numbers as at the end of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.stream.pipeline import DataConfig, open_split
from launcher.errors import RunError
from launcher.run.validate import evaluate
from tests.launcher.conftest import Start, finish, run_ranks, scl


def first_pixels_decide(images: Tensor) -> Tensor:
    """Logits of ten classes that depend on the image alone."""
    return images.flatten(1)[:, 20:30]


@pytest.mark.parametrize("batch_size", [7, 64, 1000])
def test_the_batch_size_does_not_matter(shards: Path, batch_size: int) -> None:
    config = DataConfig(path=shards, image_size=8, eval_crop_ratio=1.0, eval_batch_size=batch_size)
    results = evaluate(
        first_pixels_decide, open_split(config, "val"), config, device=torch.device("cpu")
    )
    reference = DataConfig(path=shards, image_size=8, eval_crop_ratio=1.0, eval_batch_size=360)
    expected = evaluate(
        first_pixels_decide, open_split(reference, "val"), reference, device=torch.device("cpu")
    )
    assert results["val/top1"] == expected["val/top1"]
    assert results["val/top5"] == expected["val/top5"]
    # Float32 sums in another order.
    assert results["val/loss"] == pytest.approx(expected["val/loss"], rel=1e-5)


def test_ranks_that_do_not_cover_the_split_are_an_error(shards: Path) -> None:
    config = DataConfig(path=shards, image_size=8, eval_crop_ratio=1.0)
    dataset = open_split(config, "val")
    dataset.manifest = dataset.manifest.model_copy(update={"samples": 361})
    with pytest.raises(RunError, match="evaluation saw 360 samples of 361"):
        evaluate(first_pixels_decide, dataset, config, device=torch.device("cpu"))


def test_scl_eval_repeats_the_result_of_training(
    recipe: Path, tmp_path: Path, start: Start
) -> None:
    run_dir = tmp_path / "run"
    for code, output in run_ranks(start, recipe, run_dir, "optim.epochs=2", ranks=2):
        assert code == 0, output
    code, output = finish(start(scl("eval", run_dir, "--out", tmp_path)))
    assert code == 0, output
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert results["top1"] == pytest.approx(summary["top1"], abs=1e-9)
    assert results["top5"] == pytest.approx(summary["top5"], abs=1e-9)
    assert f"({results['correct']:,} of 360)" in output
