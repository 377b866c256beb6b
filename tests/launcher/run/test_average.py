"""Averaged weights: the formula, masks, checkpoints on other ranks, and the file at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from launcher.checkpoints import checkpoint
from launcher.errors import UsageError
from launcher.recipe.load import load_recipe
from launcher.run.average import WeightAverage
from launcher.run.parameters import Parameters
from launcher.tracking.series import SERIES
from sclcore.export import load_compact
from sclcore.registry import known_methods
from tests.launcher.conftest import Start, finish, launch, mask_variables, scl, summary
from tests.launcher.test_resume import assert_identical, segment


def test_it_is_the_formula_and_knows_dead_connections() -> None:
    torch.manual_seed(0)
    linear, norm = nn.Linear(5, 4), nn.BatchNorm1d(4)
    assert norm.running_mean is not None
    model = nn.Sequential(linear, norm)
    average = WeightAverage(Parameters(model), 0.6, masked=["0.weight"])
    expected = linear.weight.detach().double().clone()
    for n in range(1, 9):
        with torch.no_grad():
            linear.weight.add_(torch.randn(4, 5)).mul_(torch.rand(4, 5) < 0.7)
            norm.running_mean.fill_(n)
        average.update()
        decay = min(0.6, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * linear.weight.detach().double()
    now = linear.weight.detach().clone()
    versions = [p._version for p in model.parameters()]
    with average.in_place():
        # Sums of float32 that are about 1.
        wanted = expected * (now != 0)
        torch.testing.assert_close(linear.weight.double(), wanted, rtol=0, atol=1e-6)
        assert torch.equal(linear.weight != 0, now != 0)
        assert 5 < float(norm.running_mean[0]) < 8
        assert int(norm.num_batches_tracked or 0) == 0
    assert torch.equal(linear.weight, now) and float(norm.running_mean[0]) == 8
    # Or the optimizer would take them for weights it is given.
    assert versions == [p._version for p in model.parameters()]


SETTINGS = ("optim.ema_decay=0.9", "model.kwargs.norm=batch", "optim.epochs=4")


@pytest.fixture(scope="module")
def averaged(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("averaged") / "run"
    segment(launch, recipe, run_dir, *SETTINGS, "engine.zero_stage=1", ranks=2)
    return run_dir


def test_it_is_evaluated_saved_and_resumed(
    averaged: Path, recipe: Path, tmp_path: Path, start: Start
) -> None:
    """Interrupted = uninterrupted, the average with it; the file at the end is what was scored."""
    run_dir = tmp_path / "run"
    settings = (*SETTINGS, "engine.zero_stage=1")
    segment(start, recipe, run_dir, *settings, ranks=2, stop=17)
    segment(start, recipe, run_dir, *settings, ranks=2)
    assert_identical(run_dir, averaged)
    files = [(run / "model_ema.safetensors").read_bytes() for run in (run_dir, averaged)]
    assert files[0] == files[1]
    raw = load_file(averaged / "model.safetensors")
    ema = load_file(averaged / "model_ema.safetensors")
    assert raw.keys() == ema.keys()
    assert any(not torch.equal(raw[name], ema[name]) for name in raw)
    weights = [name for name in raw if raw[name].ndim > 1]
    assert any((raw[name] == 0).any() for name in weights)
    assert all(torch.equal(raw[name] != 0, ema[name] != 0) for name in weights)
    lines = (averaged / "metrics.jsonl").read_text().splitlines()
    evaluated = [line for line in map(json.loads, lines) if "val/top1" in line]
    assert len(evaluated) == 4
    assert all(s.name in line for line in evaluated for s in SERIES if s.of == "ema")
    last = json.loads((averaged / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["ema/top1"] == summary(averaged)["ema_top1"]
    model = averaged / "model_ema.safetensors"
    command = scl("eval", averaged, "--model", model, "--out", tmp_path)
    code, output = finish(start(command))
    assert code == 0, output
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    assert results["top1"] == pytest.approx(summary(averaged)["ema_top1"], abs=1e-9)


def test_it_is_the_same_in_stage_3(
    averaged: Path, recipe: Path, tmp_path: Path, start: Start
) -> None:
    """Where a rank holds a stretch of each parameter: interrupted, and against stage 1.

    Two ranks' gradients have one sum in whatever stage, so weights are the same bit for bit; mask
    variables of features that ranks share are off by the rounding of another sum.
    """
    settings, run_dir = (*SETTINGS, "engine.zero_stage=3"), tmp_path / "run"
    for stop in (17, None):
        segment(start, recipe, run_dir, *settings, ranks=2, stop=stop)
    for name in ("model", "model_ema"):
        ours, theirs = (load_file(run / f"{name}.safetensors") for run in (run_dir, averaged))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.equal(ours[key], value), key
    assert (run_dir / "layers.csv").read_bytes() == (averaged / "layers.csv").read_bytes()
    for key in ("top1", "ema_top1", "mask_hash", "macs", "parameters"):
        assert summary(run_dir)[key] == summary(averaged)[key]
    masks, others = mask_variables(run_dir), mask_variables(averaged)
    assert max(float((mask - others[name]).abs().max()) for name, mask in masks.items()) < 1e-4


def test_it_is_exported_where_that_is_asked_for(
    averaged: Path, tmp_path: Path, start: Start
) -> None:
    out = tmp_path / "export"
    model = averaged / "model_ema.safetensors"
    code, output = finish(start(scl("export", model, "--format", "csv,compact", "--out", out)))
    assert code == 0, output
    exported = load_compact(out / "model.sclc")
    assert all(torch.equal(exported[name], value) for name, value in load_file(model).items())


@pytest.mark.long
def test_other_ranks_go_on_with_it(averaged: Path, recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    segment(launch, recipe, run_dir, *SETTINGS, "engine.zero_stage=1", ranks=2, stop=17)
    segment(launch, recipe, run_dir, *SETTINGS, ranks=1)
    found = checkpoint.find(run_dir / "checkpoints")
    assert found is not None
    assert checkpoint.load_part(found, "rank-00000")["average"]["updates"] == found.step == 56
    # Batch norm sees other batches on one rank: the run goes on about as well.
    assert abs(summary(run_dir)["ema_top1"] - summary(averaged)["ema_top1"]) < 0.1


def test_a_run_ends_on_a_plateau_and_stays_ended_until_it_is_continued(
    recipe: Path, tmp_path: Path, start: Start
) -> None:
    """Of 20 epochs at a learning rate of nothing: masks are final at epoch 4, and then two more.

    Given other values, it is given as much patience again; once.
    """
    run_dir = tmp_path / "run"
    settings = ("optim.epochs=20", "schedule.freeze_masks_at=0.2", "optim.early_stop_epochs=2")
    settings += ("optim.lr=1e-12", "method.mask_lr=1e-12", "checkpoint.every_epochs=5")
    segment(start, recipe, run_dir, *settings, ranks=2)
    told = summary(run_dir)
    assert (told["epochs"], told["best_epoch"]) == (6, 4)
    assert told["best_top1"] == told["top1"]
    found = checkpoint.find(run_dir / "checkpoints")
    assert found is not None and found.step == 6 * 14
    before = (run_dir / "metrics.jsonl").read_bytes()
    segment(start, recipe, run_dir, *settings, ranks=2)
    assert (run_dir / "metrics.jsonl").read_bytes() == before

    command = scl("train", "--recipe", recipe, "--ranks", "1", "--set", f"run_dir={run_dir}")
    command += [*settings, "--continue-with", "optim.epochs=30"]
    code, said = finish(start(command))
    assert code == 0, said
    assert "continues with optim.epochs 30 instead of 20" in said
    assert "stopped after 8 of 30 epochs" in said
    assert summary(run_dir)["epochs"] == 8
    code, said = finish(start(command))
    assert code == 0 and "is finished; choose another folder" in said, said
    assert summary(run_dir)["epochs"] == 8


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("optim.ema_decay=1", r"optim\.ema_decay: should be a number above 0 and below 1"),
        (
            "optim.early_stop_epochs=0",
            r"optim\.early_stop_epochs: should be a whole number of at least 1",
        ),
    ],
)
def test_what_cannot_work_is_refused(recipe: Path, setting: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        load_recipe(recipe, [setting])


def test_methods_that_write_other_weights_have_no_average(recipe: Path) -> None:
    bernoulli = [name for name, m in known_methods().items() if "bf16" not in m.precisions]
    assert bernoulli
    for name in bernoulli:
        settings = dict(known_methods()[name].example or {})
        values = [f"method.{key}={json.dumps(value)}" for key, value in settings.items()]
        with pytest.raises(UsageError, match=r"leave optim\.ema_decay out"):
            load_recipe(recipe, [f"method.name={name}", *values, "optim.ema_decay=0.9"])
