"""Interrupted = uninterrupted: bit for bit on the same ranks, to rounding on others."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launcher.checkpoints import checkpoint
from launcher.checkpoints.convert import to_whole
from launcher.checkpoints.manifest import read_manifest
from launcher.checkpoints.saved_optimizer import SavedOptimizer
from tests.faults.published import difference, series
from tests.launcher.conftest import (
    Start,
    assert_same_to_rounding,
    finish,
    free_port,
    run_ranks,
    summary,
)

# Five starts of two ranks in one test: a minute on an idle machine, far more on a busy one.
pytestmark = pytest.mark.timeout(900)

# A save every second update: one is being written while nearly all steps are taken.
ALWAYS_WRITING = "checkpoint.every_steps=2"

TARGET = ("method.lam=null", "method.target_density=0.3")


def segment(
    start: Start,
    recipe: Path,
    run_dir: Path,
    *settings: str,
    ranks: int,
    stop: int | None = None,
) -> None:
    """Train on from where the run folder stands: to the end, or until a signal after `stop`."""
    if stop is None:
        for code, output in run_ranks(start, recipe, run_dir, *settings, ranks=ranks):
            assert code == 0, output
        return
    command = [sys.executable, "-m", "tests.launcher.stopping_rank", "--recipe", str(recipe)]
    for setting in (f"run_dir={run_dir}", *settings):
        command += ["--set", setting]
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    # Each time another rank is the one that gets the signal.
    world["SCL_TEST_STOP"] = f"{stop}:{stop % ranks}"
    processes = [start(command, RANK=str(r), LOCAL_RANK=str(r), **world) for r in range(ranks)]
    for code, output in map(finish, processes):
        assert code == 128 + signal.SIGUSR1, output
    found = checkpoint.find(run_dir / "checkpoints")
    assert found is not None and found.step == stop
    if "every" in "".join(settings):
        # Each save has the next number: many were written while steps were taken.
        assert read_manifest(found.path).serial > stop // 4


def assert_same_tree(one: Any, other: Any, where: str) -> None:
    """Equal to the last bit, at every leaf."""
    assert type(one) is type(other), where
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same_tree(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, both in enumerate(zip(one, other, strict=True)):
            assert_same_tree(*both, f"{where}.{i}")
    else:
        assert one == other, where


def assert_identical(run_dir: Path, undisturbed: Path) -> None:
    """The same model file, the same everything in the last checkpoint, the same metrics."""
    model = (run_dir / "model.safetensors").read_bytes()
    assert model == (undisturbed / "model.safetensors").read_bytes()
    assert summary(run_dir)["mask_hash"] == summary(undisturbed)["mask_hash"]
    assert summary(run_dir)["top1"] == summary(undisturbed)["top1"]
    ours, theirs = (checkpoint.find(run / "checkpoints") for run in (run_dir, undisturbed))
    assert ours is not None and theirs is not None
    parts = sorted(path.stem for path in theirs.path.glob("*.pt"))
    assert parts == sorted(path.stem for path in ours.path.glob("*.pt"))
    for part in parts:
        saved, expected = (checkpoint.load_part(c, part) for c in (ours, theirs))
        assert_same_tree(saved, expected, part)
    for key in ("optimizer", "samples", "data"):
        assert ours.meta[key] == theirs.meta[key], key
    told, expected = (
        series((run / "metrics.jsonl").read_bytes().splitlines()) for run in (run_dir, undisturbed)
    )
    assert any(line.get("masks/flips") for line in expected)
    assert difference(told, expected) is None


# 14 steps an epoch. Step 3: lr and λ still rise. 17: λ rises, in mid-epoch. 42: the end of an
# epoch. 66 and 68: the last update before masks freeze at 67.2, and the first after.
@pytest.mark.parametrize(
    ("settings", "stops"),
    [
        pytest.param(
            ("engine.zero_stage=0", "model.kwargs.norm=batch"), (3, 17, 68), marks=pytest.mark.long
        ),
        # In mid-course; and the choice that meets the target is part of the update after 68.
        (("engine.zero_stage=2", "model.kwargs.norm=batch", *TARGET), (33, 68)),
        pytest.param(
            ("engine.zero_stage=2", "model.kwargs.norm=batch"), (42, 66), marks=pytest.mark.long
        ),
        pytest.param(
            ("engine.zero_stage=3", "model.kwargs.norm=batch"), (17, 66), marks=pytest.mark.long
        ),
        # Masks rounded at random: each rank's position in its random numbers counts as well.
        pytest.param(
            (
                "engine.zero_stage=1",
                "engine.precision=bf16",
                "method.mask_dtype=bfloat16",
                "checkpoint.every_steps=null",
                "checkpoint.every_minutes=1e-6",
            ),
            (17,),
            marks=pytest.mark.long,
        ),
    ],
)
def test_the_same_ranks_continue_bit_for_bit(
    settings: tuple[str, ...], stops: tuple[int, ...], recipe: Path, tmp_path: Path, start: Start
) -> None:
    """In two micro-batches an update, while a checkpoint is being written."""
    settings = (ALWAYS_WRITING, *settings, "engine.max_micro_batch=24", "schedule.lam_warmup=0.3")
    undisturbed = tmp_path / "undisturbed"
    # Alone this one writes nothing in mid-epoch: that must not change anything either.
    rarely = ("checkpoint.every_steps=null", "checkpoint.every_minutes=null")
    segment(start, recipe, undisturbed, *settings, *rarely, ranks=2)
    assert 0 < summary(undisturbed)["live"] < summary(undisturbed)["connections"]
    for stop in (*stops, None):
        segment(start, recipe, tmp_path / "run", *settings, ranks=2, stop=stop)
    assert_identical(tmp_path / "run", undisturbed)


def test_other_ranks_and_stages_continue_to_rounding(
    smooth_run: Path, smooth: Path, tmp_path: Path, start: Start
) -> None:
    """1 → 3 → 2 → 1 ranks and stages 0 → 3 → 0 → 2, each cut in mid-epoch.

    The last goes on from a converted checkpoint, of which the optimizer state is one file.
    """
    run_dir = tmp_path / "run"
    for ranks, stage, stop in ((1, 0, 17), (3, 3, 40), (2, 0, 60)):
        settings = (f"engine.zero_stage={stage}", ALWAYS_WRITING)
        segment(start, smooth, run_dir, *settings, ranks=ranks, stop=stop)
    to_whole(run_dir, tmp_path / "whole")
    resumed = f"checkpoint.resume={tmp_path / 'whole'}"
    segment(start, smooth, run_dir, resumed, "engine.zero_stage=2", ranks=1)
    assert_same_to_rounding(run_dir, smooth_run)
    assert summary(run_dir)["live"] == summary(smooth_run)["live"]
    worlds = [json.loads(x) for x in (run_dir / "environment.jsonl").read_text().splitlines()]
    assert [world["world_size"] for world in worlds] == [1, 3, 2, 1]


def test_a_checkpoint_holds_what_it_must(smooth_run: Path) -> None:
    found = checkpoint.find(smooth_run / "checkpoints")
    assert found is not None
    assert found.step == 112 and found.meta["samples"] == 112 * 96
    assert found.meta["order"] == 2
    assert found.meta["progress"].keys() == {
        *("step", "epochs", "seconds", "results", "wandb_id", "wandb_said", "steering", "shift"),
        *("best_top1", "best_epoch", "stopped_early", "patient_from"),
    }
    assert found.meta["recipe"]["schedule"]["freeze_masks_at"] == 0.6
    assert found.evaluation is not None and found.evaluation.final
    assert found.evaluation.top1 == summary(smooth_run)["top1"]
    assert found.evaluation.live == summary(smooth_run)["live"]
    files = read_manifest(found.path).files
    # Nothing is sharded in stage 0: rank 0 alone writes the optimizer.
    assert files.keys() == {"model.pt", "optimizer-00000.pt", "rank-00000.pt", "rank-00001.pt"}
    state = SavedOptimizer(found).whole()
    learned = state["blocks.0.mlp.fc1.weight"]["values"]
    assert learned.keys() >= {"weight", "mask", "momentum_buffer", "mask_momentum_buffer"}
    own = checkpoint.load_part(found, "rank-00001")
    assert own.keys() >= {"torch", "python", "numpy", "buffers"}


def test_a_disk_that_refuses_is_survived_until_the_end(
    recipe: Path, tmp_path: Path, start: Start
) -> None:
    """No file may grow beyond 400 kB (`ulimit -f`), which the model fits and the optimizer not."""
    run_dir = tmp_path / "run"
    wide = ("model.kwargs.width=32", "optim.epochs=4")
    segment(start, recipe, run_dir, *wide, ranks=1, stop=30)
    command = [sys.executable, "-m", "launcher.train", "--recipe", str(recipe), "--set"]
    command += [f"run_dir={run_dir}", *wide]
    limited = ["bash", "-c", 'ulimit -f 400; exec "$@"', "bash", *command]
    code, output = finish(start(limited))
    assert code == 1, output
    # Two epochs end after step 30, the last of them with an error besides.
    assert output.count("WARNING scl.checkpoint: the state after step") == 2, output
    assert "File too large; what was saved before is untouched" in output
    assert "error: the state after step 56 could not be saved" in output
    # What the run was for is there all the same.
    assert (run_dir / "model.safetensors").exists() and (run_dir / "summary.json").exists()
    assert [path.name for path in (run_dir / "checkpoints").glob(".tmp-*")] == []
    found = checkpoint.find(run_dir / "checkpoints")
    assert found is not None and found.step == 30
    # With room again, the same command makes up for it.
    segment(start, recipe, run_dir, *wide, ranks=1)
    found = checkpoint.find(run_dir / "checkpoints")
    assert found is not None and found.step == 56
