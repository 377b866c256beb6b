"""TensorBoard's own reader on what a run has written for it."""

from __future__ import annotations

import builtins
import importlib.util
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launcher.errors import UsageError
from launcher.recipe.tracking import TrackingConfig
from launcher.tracking import Histogram, Tracker
from launcher.tracking.tensorboard_run import check_tensorboard

CONFIG = TrackingConfig(wandb="off", tensorboard=True)


def _tracker(folder: Path, resume_step: int = 0) -> Tracker:
    return Tracker(folder, CONFIG, run_name="trial", recipe={}, resume_step=resume_step)


def test_series_histograms_and_pictures_over_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is an optional package")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = _tracker(tmp_path)
    for step in (10, 20, 30):
        values = {"train/loss": 1 / step, "masks/histogram": Histogram((1, 3), (-1.0, 0.0, 1.0))}
        tracker.log({**values, "note": "no number"}, step=step, epoch=0.5)
    tracker.close(exit_code=1)
    # Its files are told apart by the second.
    time.sleep(1.1)
    resumed = _tracker(tmp_path, resume_step=20)
    resumed.log({"train/loss": 0.25}, step=30, epoch=0.75)
    Image.new("RGB", (4, 3), "red").save(tmp_path / "summary.png")
    resumed.charts([tmp_path / "summary.png", tmp_path / "none.png"])
    resumed.close()

    events = EventAccumulator(str(tmp_path / "tensorboard"), {"histograms": 0}).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    seen = [(event.step, round(event.value, 4)) for event in events.Scalars("train/loss")]
    assert seen == [(10, 0.1), (20, 0.05), (30, 0.25)], "each step once, as in metrics.jsonl"
    histogram = events.Histograms("masks/histogram")[0].histogram_value
    assert (histogram.num, histogram.sum, [*histogram.bucket]) == (4, 1, [1, 3])
    [image] = events.Images("charts/summary")
    assert (image.width, image.height, image.step) == (4, 3, 30)


def test_without_its_package_it_is_refused_before_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    check_tensorboard(TrackingConfig())
    with pytest.raises(UsageError, match="pip install tensorboard"):
        check_tensorboard(CONFIG)


def test_a_failure_of_it_ends_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def broken(name: str, *more: Any, **options: Any) -> Any:
        if name == "torch.utils.tensorboard":
            raise ImportError("protobuf is too old")
        return real(name, *more, **options)

    monkeypatch.setattr(builtins, "__import__", broken)
    with caplog.at_level(logging.WARNING):
        tracker = _tracker(tmp_path)
        tracker.log({"train/loss": 1.0}, step=1, epoch=0)
        tracker.close()
    said = [r.getMessage() for r in caplog.records if r.name == "scl.tracking"]
    assert said == ["TensorBoard cannot begin (protobuf is too old); going on without it"]
    assert (tmp_path / "metrics.jsonl").read_text().count("train/loss") == 1
