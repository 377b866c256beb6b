"""`scl predict`: single images get the probabilities that evaluation gives them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.stream.pipeline import DataConfig, open_split
from launcher import cli
from launcher.errors import UsageError
from launcher.evaluation.classify import classify
from launcher.evaluation.predictions import predict_run


@pytest.fixture(scope="module")
def images(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 70 samples of the validation split, by number: more than one batch."""
    folder = tmp_path_factory.mktemp("images")
    dataset = open_split(DataConfig(path=shards, image_size=8, eval_crop_ratio=1.0), "val")
    for i in range(70):
        Image.fromarray(dataset[i]["image"][0].numpy()).save(folder / f"{i:03d}.png")
    return folder


def test_probabilities_are_those_of_the_evaluation(
    smooth_run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out.csv"
    assert cli.main(["predict", str(smooth_run), str(images), "--csv", str(out)]) == 0
    evaluated = predict_run(smooth_run)
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    assert [Path(row["image"]).name for row in rows] == [f"{i:03d}.png" for i in range(70)]
    for i, row in enumerate(rows):
        assert row["class"] == evaluated.classes[evaluated.predicted[i]]
        # Six digits, of logits that were added up in another order.
        assert float(row["probability"]) == pytest.approx(evaluated.confidence[i], abs=2e-6)
        assert sum(float(row[name]) for name in evaluated.classes) == pytest.approx(1, abs=1e-5)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"{images}/000.png: {rows[0]['class']} ")
    assert first.count("%") == 3
    assert cli.main(["predict", str(smooth_run), str(images), "--csv", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_is_named_and_the_others_are_not_lost(
    smooth_run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, out = tmp_path / "bad.png", tmp_path / "out.csv"
    bad.write_bytes(b"no image")
    command = ["predict", str(smooth_run), str(bad), str(images / "000.png"), "--csv", str(out)]
    assert cli.main(command) == 1
    shown = capsys.readouterr()
    assert f"error: {bad} cannot be read: cannot identify image file" in shown.err
    assert "0x" not in shown.err
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    assert rows[0]["class"] == "" and rows[1]["class"] != ""


def test_transparency_is_seen_as_when_the_set_was_packed(
    smooth_run: Path, images: Path, tmp_path: Path
) -> None:
    """A black digit on nothing, for a run whose images were put before white."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("recipe.yaml", "model.safetensors"):
        shutil.copy(smooth_run / name, run / name)
    origin = json.loads((smooth_run / "origin.json").read_text())
    assert origin["data"]["background"] is None
    origin["data"]["background"] = "white"
    (run / "origin.json").write_text(json.dumps(origin))
    grey = np.asarray(Image.open(images / "000.png"))
    ink = Image.fromarray(np.stack([np.zeros_like(grey), 255 - grey], 2), "LA")
    ink.save(tmp_path / "ink.png")
    rows = classify(run, [tmp_path / "ink.png", images / "000.png"]).probabilities
    # Blending rounds: a pixel may be off by one of 255.
    assert np.abs(rows[0] - rows[1]).max() < 0.02


def test_what_is_no_image_is_refused(smooth_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no images"):
        classify(smooth_run, [tmp_path])
    with pytest.raises(UsageError, match="there is no image or folder"):
        classify(smooth_run, [tmp_path / "none.png"])
