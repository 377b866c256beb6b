"""Distillation: the loss, what the teacher sees, and teachers that cannot be."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from data.augmentation.mixing import mix
from data.shards.manifest import ImageStats
from data.stream.pipeline import normalise
from launcher.errors import UsageError
from launcher.recipe.distill import DistillConfig
from launcher.recipe.load import load_recipe
from launcher.run.inputs import open_inputs
from launcher.run.teacher import Teacher, read_teacher
from tests.launcher.conftest import (
    Start,
    assert_same_to_rounding,
    finish,
    launch,
    scl,
    summary,
)
from tests.launcher.test_resume import segment


def stats(mean: float, std: float) -> ImageStats:
    return ImageStats(channels=1, mean=[mean], std=[std], measured_on=1)


def test_the_loss_is_hintons() -> None:
    """Against sums written out, at temperature 3 and weight 0.25."""
    torch.manual_seed(0)
    student, theirs = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    config = DistillConfig(teacher="x", weight=0.25, temperature=3)
    teacher = Teacher(nn.Identity(), config, stats(0, 1), stats(0, 1))
    of_labels = student.logsumexp(1).mean()
    expected = 0.0
    for s, t in zip(student.tolist(), theirs.tolist(), strict=True):
        p, q = ([math.exp(x / 3) for x in row] for row in (t, s))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 5
    found = teacher.loss(student, theirs, of_labels)
    assert found.item() == pytest.approx(0.75 * of_labels.item() + 0.25 * 9 * expected, rel=1e-5)
    found.backward()
    assert student.grad is not None and student.grad.abs().sum() > 0


def test_the_teacher_sees_the_mixed_images_as_it_was_trained_to() -> None:
    torch.manual_seed(0)
    raw = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    mine, its = stats(0.3, 0.2), stats(0.6, 0.4)
    teacher = Teacher(nn.Identity(), DistillConfig(teacher="x"), its, mine)
    # Images in float32 of about 1; both ways round a few times.
    seen = teacher.logits(normalise(raw, mine))
    torch.testing.assert_close(seen, normalise(raw, its), rtol=0, atol=1e-5)
    batch = {"mix_lam": torch.full((4,), 0.7)}
    blended = teacher.logits(mix(normalise(raw, mine), batch))
    torch.testing.assert_close(blended, mix(normalise(raw, its), batch), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def teacher(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("teacher") / "run"
    dense = ("method={name: dense}", "optim.epochs=3", "model.kwargs.width=16")
    segment(launch, recipe, run_dir, *dense, ranks=1)
    return run_dir


def test_two_ranks_learn_what_one_learns(
    teacher: Path, smooth: Path, tmp_path: Path, start: Start
) -> None:
    settings = (f"distill={{teacher: {teacher}, weight: 0.9}}", "optim.epochs=2")
    for ranks in (1, 2):
        segment(start, smooth, tmp_path / f"{ranks}", *settings, ranks=ranks)
    assert_same_to_rounding(tmp_path / "2", tmp_path / "1")
    segment(start, smooth, tmp_path / "alone", *settings[1:], ranks=1)
    losses = {}
    for name in ("1", "alone"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = json.loads(lines[0])["train/loss"]
    # The same student: what differs is what it is told.
    origin = [json.loads((tmp_path / n / "origin.json").read_text()) for n in ("1", "alone")]
    assert len({each["initial_weights_hash"] for each in origin}) == 1
    assert losses["1"] != losses["alone"]
    assert summary(tmp_path / "1")["mask_hash"] != summary(tmp_path / "alone")["mask_hash"]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("distill.teacher=no_such_model", r"there is no no_such_model: give the folder of a run"),
        (
            "distill={teacher: '{run}', weight: 1.5}",
            r"distill\.weight: should be a number above 0 and up to 1",
        ),
        (
            "distill={teacher: '{run}', temperature: 0}",
            r"distill\.temperature: should be a number above 0",
        ),
        ("distill={teacher: '{foreign}'}", r"foreign has other classes \(9\) than the data \(10\)"),
        ("distill={teacher: '{empty}'}", r"empty holds no recipe.yaml"),
        ("distill={weight: 0.5}", r"distill\.teacher"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused(
    setting: str, sentence: str, teacher: Path, recipe: Path, tmp_path: Path
) -> None:
    foreign = shutil.copytree(teacher, tmp_path / "foreign")
    origin = json.loads((foreign / "origin.json").read_text())
    origin["data"]["classes"].pop()
    (foreign / "origin.json").write_text(json.dumps(origin))
    (tmp_path / "empty").mkdir()
    for name, path in (("run", teacher), ("foreign", foreign), ("empty", tmp_path / "empty")):
        setting = setting.replace(f"{{{name}}}", str(path))
    with pytest.raises(UsageError, match=sentence):
        read = load_recipe(recipe, [setting])
        read_teacher(read, open_inputs(read, 1).manifest)


def test_a_refused_teacher_ends_before_any_process(
    recipe: Path, tmp_path: Path, start: Start
) -> None:
    settings = ("--set", "distill.teacher=no_such_model", "--set", f"run_dir={tmp_path / 'run'}")
    code, output = finish(start(scl("train", "--recipe", recipe, *settings)))
    assert code == 2, output
    assert "\nerror: distill.teacher: there is no no_such_model" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()
