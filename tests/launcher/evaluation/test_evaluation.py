"""`scl eval`: exact counts, calibration as others compute it, which classes pay, folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix
from torchmetrics.classification import MulticlassCalibrationError

from data.stream.pipeline import DataConfig, open_split
from launcher import cli
from launcher.errors import RunError, UsageError
from launcher.evaluation import measures, picture
from launcher.evaluation.predictions import Predictions, _predict, predict_run
from launcher.evaluation.samples import known_of, open_samples
from launcher.evaluation.show import show
from launcher.recipe.load import load_recipe
from tests.launcher.conftest import summary


def made_up(seed: int, size: int = 600, classes: int = 4, skill: float = 0.7) -> Predictions:
    """Predictions of a network that is right with probability `skill`."""
    rng = np.random.default_rng(seed)
    label = np.random.default_rng(99).integers(0, classes, size)
    wrong = (label + rng.integers(1, classes, size)) % classes
    predicted = np.where(rng.random(size) < skill, label, wrong)
    return Predictions(
        run=f"run{seed}",
        source="made up",
        classes=[f"class {i}" for i in range(classes)],
        label=label,
        predicted=predicted,
        in_top5=np.ones(size, np.bool_),
        confidence=rng.uniform(1 / classes, 1, size),
        loss=rng.random(size),
        sound=np.ones(size, np.bool_),
    )


@pytest.mark.parametrize("length", [1, 60])
def test_no_word_of_the_picture_is_cut_off(length: int) -> None:
    dense = made_up(0, size=2000, classes=400)
    sparse = replace(made_up(1, size=2000, classes=400), run="a run with a name")
    names = [f"{'x' * length}{i}" for i in range(400)]
    dense, sparse = (replace(p, classes=names) for p in (dense, sparse))
    against = measures.compare(sparse, dense)
    results = measures.measure(sparse)
    figure = picture.figure_of({"run": sparse.run, "results": results, "against": against})
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        for label in (axes.xaxis.label, axes.yaxis.label):
            box = label.get_window_extent()
            assert 0 <= box.x0 <= box.x1 <= figure.bbox.width, label.get_text()
            assert 0 <= box.y0 <= box.y1 <= figure.bbox.height, label.get_text()


# --- what is measured ---


def test_calibration_is_that_of_torchmetrics_and_scikit_learn() -> None:
    p = made_up(0)
    results = measures.measure(p)
    # torchmetrics wants all probabilities; those below the largest do not matter to it.
    rest = torch.from_numpy((1 - p.confidence) / 3)
    probabilities = rest[:, None].repeat(1, 4).float()
    rows = torch.arange(len(p.label))
    probabilities[rows, torch.from_numpy(p.predicted)] = torch.from_numpy(p.confidence).float()
    metric = MulticlassCalibrationError(num_classes=4, n_bins=measures.BINS, norm="l1")
    expected = float(metric(probabilities, torch.from_numpy(p.label)))
    # float32 there, and a confidence at the edge of a bin may fall on its other side.
    assert results["ece"] == pytest.approx(expected, abs=2e-3)
    accuracy, confidence = calibration_curve(p.correct, p.confidence, n_bins=measures.BINS)
    assert [b["accuracy"] for b in results["calibration"]] == pytest.approx(accuracy.tolist())
    assert [b["confidence"] for b in results["calibration"]] == pytest.approx(confidence.tolist())
    assert sum(b["samples"] for b in results["calibration"]) == 600


def test_counts_are_exact_and_what_did_not_decode_is_wrong() -> None:
    p = made_up(1)
    p = replace(p, sound=np.arange(600) >= 50)
    results = measures.measure(p)
    right = int((p.predicted == p.label)[50:].sum())
    assert results["correct"] == right and results["top1"] == right / 600
    assert results["corrupt"] == 50 and results["top5"] == 550 / 600
    assert sum(c["correct"] for c in results["classes"]) == right
    assert sum(c["samples"] for c in results["classes"]) == 550
    assert results["loss"] == pytest.approx(p.loss[50:].mean())


@pytest.mark.parametrize("classes", [4, 20, 100])
def test_the_confusion_matrix_is_that_of_scikit_learn(
    classes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    p = made_up(6, classes=classes)
    p = replace(p, sound=np.arange(600) >= 50)
    results = measures.measure(p)
    expected = confusion_matrix(p.label[50:], p.predicted[50:], labels=range(classes))
    assert (measures.confusion_matrix(results) == expected).all()
    off = np.where(np.eye(classes), 0, expected)
    assert results["confusions"][0]["samples"] == off.max()
    report = {"run": "r", "data": "d", "results": results}
    show(report)
    shown = capsys.readouterr().out
    title = "Which class (rows) is taken" if classes <= 12 else "Most often mistaken"
    assert title in shown and f"class {np.argwhere(off == off.max())[0, 0]}" in shown
    assert picture.draw_confusion(report).startswith(b"\x89PNG")


def test_the_class_that_pays_is_found() -> None:
    """Two equal networks, but for one class of which one of them knows half as much."""
    dense = made_up(2, size=2000, skill=0.9)
    rng = np.random.default_rng(5)
    ruined = (dense.label == 2) & (rng.random(2000) < 0.5)
    sparse = replace(dense, run="sparse", predicted=np.where(ruined, 3, dense.predicted))
    found = measures.compare(sparse, dense)
    assert found["classes"][0]["class"] == "class 2" and found["classes"][0]["significant"]
    assert [row["significant"] for row in found["classes"][1:]] == [False] * 3
    worst = found["classes"][0]
    assert worst["lost"] == int((ruined & dense.correct).sum()) and worst["gained"] == 0
    assert worst["sparse"] == worst["dense"] - worst["lost"]
    assert worst["p"] == pytest.approx(binomtest(0, worst["lost"]).pvalue)
    differ = (sparse.predicted != dense.predicted).mean()
    assert found["disagreement"] == pytest.approx(differ)
    assert picture.draw(
        {"run": "sparse", "results": measures.measure(sparse), "against": found}
    ).startswith(b"\x89PNG")


def test_networks_that_saw_other_samples_are_not_compared() -> None:
    one = made_up(3)
    with pytest.raises(UsageError, match="were not evaluated on the same samples"):
        measures.compare(one, replace(one, label=(one.label + 1) % 4))


# --- of a run ---


def test_scl_eval_against_another_run(
    smooth_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run of its own structure as another: the same network, and so no difference."""
    out = tmp_path / "out"
    command = ["eval", str(smooth_run), "--against", str(smooth_run), "--out", str(out)]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "They disagree on 0.00 % of the samples" in shown
    report = json.loads((out / "eval.json").read_text())
    assert report["results"]["top1"] == pytest.approx(summary(smooth_run)["top1"], abs=1e-9)
    assert report["results"]["top5"] == pytest.approx(summary(smooth_run)["top5"], abs=1e-9)
    assert report["results"]["samples"] == 360
    for name in ("eval.png", "confusion.png"):
        with Image.open(out / name) as image:
            assert image.format == "PNG"
    # Right or wrong, each sample is in one field of the matrix.
    assert measures.confusion_matrix(report["results"]).sum() == 360
    assert cli.main(command) == 2
    assert "holds eval.json and eval.png and confusion.png already" in capsys.readouterr().err


@pytest.fixture(scope="module")
def class_folders(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The validation split as `CLASS/id.png`."""
    root = tmp_path_factory.mktemp("folders")
    config = DataConfig(path=shards, image_size=8, eval_crop_ratio=1.0)
    dataset = open_split(config, "val")
    for i in range(len(dataset)):
        item = dataset[i]
        folder = root / dataset.manifest.classes[item["label"]]
        folder.mkdir(exist_ok=True)
        Image.fromarray(item["image"][0].numpy()).save(folder / f"{i}.png")
    return root


def test_a_folder_gives_what_its_shards_give(smooth_run: Path, class_folders: Path) -> None:
    shards = measures.measure(predict_run(smooth_run))
    folder = measures.measure(predict_run(smooth_run, data=str(class_folders)))
    assert folder["classes"] == shards["classes"] and folder["top5"] == shards["top5"]
    # The same logits, added up in another order.
    assert folder["loss"] == pytest.approx(shards["loss"], rel=1e-6)


def test_a_damaged_image_counts_as_wrong(
    smooth_run: Path, class_folders: Path, tmp_path: Path
) -> None:
    (tmp_path / "7").mkdir()
    for path in list((class_folders / "7").iterdir())[:5]:
        (tmp_path / "7" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "7" / "damaged.png").write_bytes(b"no image")
    results = measures.measure(predict_run(smooth_run, data=str(tmp_path)))
    assert results["samples"] == 6 and results["corrupt"] == 1
    assert results["top1"] == results["correct"] / 6


def test_what_cannot_be_evaluated(smooth_run: Path, tmp_path: Path) -> None:
    (tmp_path / "eleven").mkdir()
    (tmp_path / "eleven" / "a.png").write_bytes(b"")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"data": str(tmp_path)}, "eleven is none of the run's 10 classes"),
        ({"data": str(tmp_path / "none")}, "there is no .*none/val, nor a folder"),
        ({"data": str(tmp_path / "eleven")}, "is no folder of class folders"),
        ({"model": tmp_path / "other.pt"}, "is not of the model vit_tiny_patch16_224"),
        ({"model": tmp_path / "none.pt"}, "there is no file or folder"),
    )
    for arguments, sentence in cases:
        with pytest.raises(UsageError, match=sentence):
            predict_run(smooth_run, **arguments)


def test_samples_that_are_not_covered_are_an_error(smooth_run: Path) -> None:
    recipe = load_recipe(smooth_run / "recipe.yaml")
    known = known_of(smooth_run, recipe)
    samples = open_samples(recipe.data, known, "val")
    twice = list(samples.batches) * 2
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    with pytest.raises(RunError, match="saw 0 of 360 samples exactly once"):
        _predict(network, replace(samples, batches=iter(twice)), known, "run")
