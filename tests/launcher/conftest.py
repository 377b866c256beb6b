"""Real runs for the tests of launcher/: packed digits, a small recipe, real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from data.packing.pack import pack
from data.sources.digits import digits
from launcher.checkpoints import checkpoint
from launcher.checkpoints.saved_optimizer import SavedOptimizer
from tests import forkserver
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Asks for an interpreter of its own.
ANEW = True

Start = Callable[..., subprocess.Popen[str]]


def environment(**more: str) -> dict[str, str]:
    """This process' environment, with nothing that would make a child think it is a rank."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in LAUNCHER_VARIABLES and not key.startswith(("SLURM", "WANDB", "COLUMNS"))
    }
    return kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | more


def finish(process: subprocess.Popen[str], timeout: float = 200) -> tuple[int, str]:
    """Exit code and output; a process that outlives `timeout` fails the test."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_group(process)
        output, _ = process.communicate()
        pytest.fail(f"still running after {timeout} s:\n{output[-5000:]}")
    return process.returncode, output


def kill_group(process: subprocess.Popen[str]) -> None:
    """End `process` and all below it, whatever session they are in."""
    try:
        below = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    for child in below:
        child.kill()
    process.kill()


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """Every process that has the run's folder among its arguments."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(run_dir) in part for part in process.info["cmdline"] or []):
            found.append(process)
    return found


def wait_until(condition: Callable[[], Any], timeout: float = 120, what: str = "") -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s in vain: {what}"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scikit-learn's digits, packed."""
    folder = tmp_path_factory.mktemp("digits")
    pack(digits(), folder, progress=False)
    return folder


@pytest.fixture(scope="session")
def recipe(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of seconds in which masks die early and keep changing until they freeze.

    Group norm, so that a network does not depend on how its batch is cut over ranks.
    """
    values = {
        "name": "small",
        "model": {"name": "small_convnet", "kwargs": {"width": 8, "norm": "group"}},
        "data": {
            "path": str(shards),
            "image_size": 8,
            "augment": "crop",
            "crop_padding": 1,
            "eval_crop_ratio": 1.0,
        },
        "method": {"name": "scl", "lam": 0.3, "mask_lr": 0.008},
        "optim": {"global_batch_size": 96, "epochs": 8, "lr": 0.05},
        "schedule": {"freeze_masks_at": 0.6},
        "tracking": {"wandb": "off", "log_every": 5},
    }
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def launch(command: list[str], anew: bool = False, /, **more: str) -> subprocess.Popen[str]:
    """Start `command` at the root of the checkout; the caller sees to its end.

    A Python command is forked from a process that has everything imported, unless `anew` is ANEW.
    """
    begin = subprocess.Popen if anew or command[0] != sys.executable else forkserver.popen
    return begin(
        command,
        cwd=ROOT,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def start() -> Iterator[Start]:
    """`start(command, [ANEW,] **environment)` → a process, which does not outlive the test."""
    started: list[subprocess.Popen[str]] = []

    def run(command: list[str], anew: bool = False, /, **more: str) -> subprocess.Popen[str]:
        started.append(launch(command, anew, **more))
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            kill_group(process)
            process.wait()


def scl(*arguments: str | Path) -> list[str]:
    """The command line of `scl`."""
    return [sys.executable, "-m", "launcher.cli", *map(str, arguments)]


def train(recipe: Path, run_dir: Path, *settings: str, ranks: int = 2) -> list[str]:
    """The command line of `scl train` into `run_dir`."""
    command = scl("train", "--recipe", recipe, "--ranks", str(ranks), "--set", f"run_dir={run_dir}")
    for setting in settings:
        command += ["--set", setting]
    return command


def run_ranks(
    start: Start, recipe: Path, run_dir: Path, *settings: str, ranks: int
) -> list[tuple[int, str]]:
    """Start the ranks by hand, as srun does; returns (code, output) of each."""
    command = [sys.executable, "-m", "launcher.train", "--recipe", str(recipe)]
    for setting in (f"run_dir={run_dir}", *settings):
        command += ["--set", setting]
    port = free_port()
    processes = [
        start(
            command,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in range(ranks)
    ]
    return [finish(process) for process in processes]


@pytest.fixture(scope="session")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the small recipe on 2 ranks, by `scl train`, with an offline W&B run."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    code, output = finish(launch(train(recipe, run_dir, "tracking.wandb=offline")))
    assert code == 0, output
    (run_dir / "output.txt").write_text(output)
    return run_dir


@pytest.fixture(scope="session")
def smooth(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small recipe with a small vision transformer.

    Max pooling and ReLU turn a difference of rounding into another gradient where two pixels are
    equal, as in the blank margin of a digit; a transformer with GELU is smooth, so that what
    differs between two ways to add up the same batch is rounding alone.
    """
    path = tmp_path_factory.mktemp("smooth") / "smooth.yaml"
    path.write_text(
        f"base: {recipe}\n"
        "name: smooth\n"
        "model:\n"
        "  name: vit_tiny_patch16_224\n"
        "  kwargs: {img_size: 8, patch_size: 2, embed_dim: 25, depth: 2, num_heads: 5}\n"
    )
    return path


@pytest.fixture(scope="session")
def smooth_run(smooth: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the smooth recipe on 2 ranks."""
    run_dir = tmp_path_factory.mktemp("smooth_run") / "run"
    for code, output in run_ranks(launch, smooth, run_dir, ranks=2):
        assert code == 0, output
    assert 0 < summary(run_dir)["live"] < 0.9 * summary(run_dir)["connections"]
    return run_dir


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def mask_variables(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.find(run_dir / "checkpoints")
    assert newest is not None
    return {
        name: piece["values"]["mask"].view(piece["shape"])
        for name, piece in SavedOptimizer(newest).whole().items()
        if "mask" in piece["values"]
    }


def assert_same_to_rounding(one: Path, other: Path) -> None:
    """The same network up to the order in which float32 gradients were added.

    A sum in another order differs by 1e-7 of it, and 112 updates of a smooth network amplify that
    little. Between 1, 2 and 3 ranks the largest difference seen was 2e-4 for a mask variable (a
    feature with hardly any gradient is divided by that, rounding and all) and 6e-8 for a weight,
    and no mask differed; one within 2e-4 of 0 could. A wrong sum (a rank left out, a batch cut
    wrongly) shows in the first digit after a few updates.
    """
    masks, others = mask_variables(one), mask_variables(other)
    assert masks.keys() == others.keys()
    for name, mask in masks.items():
        assert (mask - others[name]).abs().max() < 1e-3
        assert int((mask > 0).ne(others[name] > 0).sum()) <= 1
    weights, other_weights = (load_file(run / "model.safetensors") for run in (one, other))
    for name, weight in weights.items():
        both = (weight != 0) == (other_weights[name] != 0)
        assert (weight - other_weights[name])[both].abs().max() < 1e-5, name
