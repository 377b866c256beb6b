"""The main job with real processes: the same result whoever starts it, and whatever happens."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.shards.index import SampleIndex
from data.shards.manifest import load_manifest
from launcher.checkpoints import checkpoint
from tests.launcher.conftest import (
    ANEW,
    Start,
    assert_same_to_rounding,
    finish,
    free_port,
    mask_variables,
    processes_of,
    run_ranks,
    summary,
    train,
    wait_until,
)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_identical(run_dir: Path, undisturbed: Path) -> None:
    """The same model, bit for bit, and the same course: nothing is left out or told twice."""
    assert summary(run_dir)["mask_hash"] == summary(undisturbed)["mask_hash"]
    model = (run_dir / "model.safetensors").read_bytes()
    assert model == (undisturbed / "model.safetensors").read_bytes()
    steps = [line["step"] for line in metrics(run_dir)]
    assert steps == [line["step"] for line in metrics(undisturbed)]


def test_a_run_leaves_everything_it_promises(undisturbed: Path) -> None:
    result = summary(undisturbed)
    assert result["world_size"] == 2
    assert result["top1"] > 0.5
    assert 0 < result["live"] < 0.9 * result["connections"]
    assert result["macs"] < result["macs_dense"]
    for path in result["artifacts"].values():
        assert Path(path).exists(), path
    weights = load_file(undisturbed / "model.safetensors")
    zeros = sum(int((weights[f"features.{i}.weight"] == 0).sum()) for i in (0, 3, 7))
    zeros += int((weights["classifier.weight"] == 0).sum())
    assert zeros == result["connections"] - result["live"]
    assert len(list((undisturbed / "wandb").glob("offline-run-*/*.wandb"))) == 1
    output = (undisturbed / "output.txt").read_text()
    assert "top-1" in output and "connections" in output and "MACs" in output
    assert "\x1b" not in output, "control characters where there is no terminal"


def test_the_same_seed_gives_the_same_network_by_every_launcher(
    undisturbed: Path, recipe: Path, tmp_path: Path, start: Start
) -> None:
    script = ["launcher/train.py", "--recipe", str(recipe), "--set"]
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    deepspeed += ["--no_local_rank", "--master_port", free_port()]
    code, output = finish(start([*deepspeed, *script, f"run_dir={tmp_path / 'deepspeed'}"], ANEW))
    assert code == 0, output
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    torchrun += ["--master_port", free_port()]
    code, output = finish(start([*torchrun, *script, f"run_dir={tmp_path / 'torchrun'}"], ANEW))
    assert code == 0, output
    for launcher in ("deepspeed", "torchrun"):
        assert_identical(tmp_path / launcher, undisturbed)


def test_another_seed_gives_another_network(
    undisturbed: Path, recipe: Path, tmp_path: Path, start: Start
) -> None:
    [(code, output)] = run_ranks(start, recipe, tmp_path / "run", "seed=1", ranks=1)
    assert code == 0, output
    assert summary(tmp_path / "run")["mask_hash"] != summary(undisturbed)["mask_hash"]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 3])
def test_any_number_of_ranks_gives_the_same_network(
    ranks: int, smooth_run: Path, smooth: Path, tmp_path: Path, start: Start
) -> None:
    run_dir = tmp_path / "run"
    for code, output in run_ranks(start, smooth, run_dir, ranks=ranks):
        assert code == 0, output
    assert_same_to_rounding(run_dir, smooth_run)


@pytest.mark.long
def test_accumulation_gives_the_same_network(
    smooth_run: Path, smooth: Path, tmp_path: Path, start: Start
) -> None:
    settings = ("engine.max_micro_batch=20", "optim.clip_grad_norm=1000")
    [(code, output)] = run_ranks(start, smooth, tmp_path / "run", *settings, ranks=1)
    assert code == 0, output
    # 96 samples in pieces of at most 20: the next even division is 6 × 16.
    assert "1 rank(s) × 6 × 16" in output
    assert_same_to_rounding(tmp_path / "run", smooth_run)


def test_a_killed_rank_ends_the_run_which_then_continues(
    undisturbed: Path, recipe: Path, tmp_path: Path, start: Start
) -> None:
    run_dir = tmp_path / "run"
    process = start(train(recipe, run_dir))
    wait_until((run_dir / "checkpoints" / "latest").exists, what="first checkpoint")
    ranks = [p for p in processes_of(run_dir) if p.name().startswith("scl-rank-")]
    assert len(ranks) == 2
    killed_at = time.monotonic()
    ranks[1].kill()
    code, output = finish(process, timeout=60)
    assert code == 1, output
    assert time.monotonic() - killed_at < 60
    assert "error:" in output
    wait_until(lambda: not processes_of(run_dir), 30, "a process was left")
    assert not (run_dir / "summary.json").exists()

    code, output = finish(start(train(recipe, run_dir)))
    assert code == 0, output
    assert "continues at step" in output
    assert_identical(run_dir, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_continues(
    number: signal.Signals, undisturbed: Path, recipe: Path, tmp_path: Path, start: Start
) -> None:
    run_dir = tmp_path / "run"
    process = start(train(recipe, run_dir))
    wait_until((run_dir / "checkpoints" / "latest").exists, what="first checkpoint")
    process.send_signal(number)
    code, output = finish(process, timeout=90)
    assert code == 128 + number, output
    assert f"stopped by {number.name}" in output
    wait_until(lambda: not processes_of(run_dir), 30, "a process was left")

    code, output = finish(start(train(recipe, run_dir)))
    assert code == 0, output
    assert_identical(run_dir, undisturbed)


def test_a_finished_run_is_shown_and_not_trained_again(
    undisturbed: Path, recipe: Path, start: Start
) -> None:
    before = (undisturbed / "metrics.jsonl").read_bytes()
    code, output = finish(start(train(recipe, undisturbed, "tracking.wandb=offline")))
    assert code == 0, output
    assert "is finished" in output and "top-1" in output
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_ranks_whose_parent_is_gone_save_and_end(
    recipe: Path, tmp_path: Path, start: Start
) -> None:
    run_dir = tmp_path / "run"
    process = start(train(recipe, run_dir, "optim.epochs=500"))
    wait_until((run_dir / "checkpoints" / "latest").exists, what="first checkpoint")
    process.kill()
    process.wait()
    wait_until(lambda: not processes_of(run_dir), 60, "orphans went on training")
    assert checkpoint.find(run_dir / "checkpoints") is not None


def test_a_checkpoint_continues_on_another_number_of_ranks(
    smooth_run: Path, smooth: Path, tmp_path: Path, start: Start
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(smooth_run, run_dir)
    (run_dir / "summary.json").unlink()
    # Forget the last epoch: the checkpoint before it is the newest then.
    folders = sorted((run_dir / "checkpoints").glob("step-*"))
    shutil.rmtree(folders[-1])
    (run_dir / "checkpoints" / "latest").write_text(folders[-2].name)
    [(code, output)] = run_ranks(start, smooth, run_dir, ranks=1)
    assert code == 0, output
    assert "continues at step" in output
    assert_same_to_rounding(run_dir, smooth_run)


def test_a_gradient_that_stays_non_finite_ends_the_run_with_a_checkpoint(
    recipe: Path, tmp_path: Path, start: Start
) -> None:
    run_dir = tmp_path / "run"
    settings = ("optim.lr=1e30", "schedule.lr_warmup=0", "engine.max_skipped_steps=3")
    results = run_ranks(start, recipe, run_dir, *settings, ranks=2)
    assert [code for code, _ in results] == [1, 1]
    assert "the gradient was not finite 3 updates in a row" in results[0][1]
    saved = checkpoint.find(run_dir / "checkpoints")
    assert saved is not None
    for mask in mask_variables(run_dir).values():
        assert torch.isfinite(mask).all()
    # What it advises is not refused.
    assert f"init.weights={run_dir} --set run_dir=…, and a lower optim.lr" in results[0][1]
    command = train(recipe, tmp_path / "next", f"init.weights={run_dir}", "optim.lr=0.05", ranks=1)
    code, said = finish(start([*command, "--dry-run"]))
    assert code == 0, said


def test_autocast_trains(recipe: Path, tmp_path: Path, start: Start) -> None:
    settings = ("engine.precision=autocast", "optim.epochs=3")
    [(code, output)] = run_ranks(start, recipe, tmp_path / "run", *settings, ranks=1)
    assert code == 0, output
    losses = [line["train/loss"] for line in metrics(tmp_path / "run") if "train/loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}


def test_dense_is_the_baseline_through_the_same_engine(
    recipe: Path, tmp_path: Path, start: Start
) -> None:
    dense = tmp_path / "dense.yaml"
    dense.write_text(f"base: {recipe}\nname: dense\nmethod: {{name: dense}}\n")
    [(code, output)] = run_ranks(start, dense, tmp_path / "run", "optim.epochs=3", ranks=1)
    assert code == 0, output
    result = summary(tmp_path / "run")
    assert result["density"] == 1 and result["macs"] == result["macs_dense"]
    assert result["top1"] > 0.5


def test_one_folder_is_trained_in_by_one_run_only(
    recipe: Path, tmp_path: Path, start: Start
) -> None:
    run_dir = tmp_path / "run"
    first = start(train(recipe, run_dir, "optim.epochs=500", ranks=1))
    wait_until((run_dir / "metrics.jsonl").exists, what="the first run to start")
    code, output = finish(start(train(recipe, run_dir, "optim.epochs=500", ranks=1)))
    assert code == 2, output
    assert "another process is training in" in output
    first.send_signal(signal.SIGTERM)
    code, output = finish(first)
    assert code == 128 + signal.SIGTERM, output


def damage(shards: Path, samples: int) -> None:
    """Overwrite the images of the first samples of the training split, sizes unchanged."""
    train = shards / "train"
    index = SampleIndex.load(train / "index.npz")
    names = [shard.name for shard in load_manifest(train).shards]
    for sample in range(samples):
        with (train / names[index.shard[sample]]).open("r+b") as file:
            file.seek(int(index.offset[sample]))
            file.write(bytes(int(index.size[sample])))


def test_too_many_corrupt_samples_end_the_run(
    recipe: Path, shards: Path, tmp_path: Path, start: Start
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged)
    damage(damaged, 5)
    settings = (f"data.path={damaged}", "optim.epochs=2")
    results = run_ranks(start, recipe, tmp_path / "run", *settings, ranks=2)
    assert [code for code, _ in results] == [1, 1]
    assert "samples could not be decoded" in results[0][1]
    assert "data.max_corrupt_fraction allows 0.10%" in results[0][1]
    assert "shard-000000.tar" in "".join(output for _, output in results)

    settings = (*settings, "data.max_corrupt_fraction=0.01")
    [(code, output)] = run_ranks(start, recipe, tmp_path / "tolerant", *settings, ranks=1)
    assert code == 0, output
    counted = [line["data/corrupt"] for line in metrics(tmp_path / "tolerant") if "lr" in line]
    # Both epochs read the five, except where they fall into the batch that is left out.
    assert 5 <= counted[-1] <= 10
