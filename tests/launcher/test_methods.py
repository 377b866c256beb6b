"""Methods in real runs: through the engine, the checkpoints and the telemetry of SCL."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launcher.errors import UsageError
from launcher.recipe.load import load_recipe
from sclcore import Schedule
from tests.launcher.conftest import finish, free_port, launch, run_ranks, summary
from tests.launcher.method_worker import CUT, METHODS

# Fifteen short runs in three starts: a minute on an idle machine, far more on a busy one.
pytestmark = pytest.mark.timeout(900)

LAYERS = "blocks.0.attn.qkv.weight", "head.weight"


@pytest.fixture(scope="module")
def runs(smooth: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Ranks → folder of one finished run by method; with two ranks also of resumed ones."""
    short = tmp_path_factory.mktemp("methods") / "short.yaml"
    short.write_text(f"base: {smooth}\nname: short\noptim: {{epochs: 2}}\n")
    folders = {}
    for ranks in (1, 2):
        folders[ranks] = tmp_path_factory.mktemp(f"ranks{ranks}")
        command = [sys.executable, "-m", "tests.launcher.method_worker", str(short)]
        command += [str(folders[ranks]), *(["resume"] if ranks == 2 else [])]
        world: dict[str, Any] = {
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
        }
        started = [launch(command, RANK=str(r), LOCAL_RANK=str(r), **world) for r in range(ranks)]
        for code, output in (finish(process, timeout=800) for process in started):
            assert code == 0, output
    return folders


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_ends_sparse_and_says_so(method: str, runs: dict[int, Path]) -> None:
    found = summary(runs[2] / method)
    assert found["method"] == method
    if "method.density=0.2" in METHODS[method]:
        assert found["live"] == round(0.2 * found["connections"])
    assert 0 < found["live"] < 0.9 * found["connections"]
    assert 0 < found["macs"] < found["macs_dense"]
    weights = load_file(runs[2] / method / "model.safetensors")
    zeros = sum(int((w == 0).sum()) for n, w in weights.items() if w.ndim > 1 and "pos" not in n)
    assert zeros >= found["connections"] - found["live"]


@pytest.mark.parametrize("method", METHODS)
def test_its_telemetry_is_that_of_any_sparse_run(method: str, runs: dict[int, Path]) -> None:
    found = lines(runs[2] / method)
    last = [line for line in found if "connections/live" in line][-1]
    assert last["connections/live"] == summary(runs[2] / method)["live"]
    for layer in LAYERS:
        assert 0 < last[f"density/{layer}"] <= 1
    flips = sum(line.get("masks/flips", 0.0) for line in found)
    revivals = sum(line.get("masks/revivals", 0.0) for line in found)
    assert flips > 0
    # What magnitude has removed stays away, what RigL grows was dead.
    if method in ("imp", "magnitude", "projection", "rigl"):
        assert (revivals == 0) == (method in ("imp", "magnitude"))


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_is_uninterrupted_bit_for_bit(method: str, runs: dict[int, Path]) -> None:
    """From update 9 of 28, in mid-epoch and in the middle of pruning, on two ranks."""
    whole, resumed = runs[2] / method, runs[2] / f"{method}-resumed"
    steps = [line["step"] for line in lines(resumed)]
    assert min(steps) > CUT
    assert (whole / "model.safetensors").read_bytes() == (
        resumed / "model.safetensors"
    ).read_bytes()
    assert summary(whole)["mask_hash"] == summary(resumed)["mask_hash"]


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_are_one_to_rounding(method: str, runs: dict[int, Path]) -> None:
    """Gradients differ by the order of a sum, 1e-7 of them; one mask in 500 may fall otherwise."""
    one, two = (load_file(runs[ranks] / method / "model.safetensors") for ranks in (1, 2))
    different = sum(int(((one[n] != 0) != (two[n] != 0)).sum()) for n in one)
    assert different <= summary(runs[1] / method)["connections"] / 500
    for name, weight in one.items():
        both = (weight != 0) == (two[name] != 0)
        assert torch.allclose(weight[both], two[name][both], rtol=0, atol=1e-3), name


def test_gates_are_drawn_once_for_all_micro_batches(smooth: Path, runs: dict[int, Path]) -> None:
    """One rank in two micro-batches: the same gates, and the network of one batch to rounding."""
    whole = runs[1] / "l0"
    split = runs[1] / "l0-split"
    settings = ["optim.epochs=2", "method.name=l0", *METHODS["l0"], "engine.max_micro_batch=48"]
    [(code, output)] = run_ranks(launch, smooth, split, *settings, ranks=1)
    assert code == 0, output
    assert "1 rank(s) × 2 × 48" in output
    assert summary(split)["mask_hash"] == summary(whole)["mask_hash"]
    one, two = (load_file(run / "model.safetensors") for run in (whole, split))
    for name, weight in one.items():
        assert torch.allclose(weight, two[name], rtol=0, atol=1e-3), name


def test_a_low_precision_copy_is_refused_where_weights_are_drawn(recipe: Path) -> None:
    settings = ["method.name=l0", "method.lam=1", "engine.precision=bf16"]
    words = r"method l0 writes other weights .* must be fp32 or autocast, not bf16"
    with pytest.raises(UsageError, match=words):
        load_recipe(recipe, settings)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sharded_state_is_refused_before_anything_starts(
    method: str, stage: int, recipe: Path
) -> None:
    settings = [f"method.name={method}", *METHODS[method], f"engine.zero_stage={stage}"]
    with pytest.raises(UsageError, match=rf"method {method} needs whole .* must be 0, not {stage}"):
        load_recipe(recipe, settings)


def test_an_unknown_method_is_answered_with_all_names(recipe: Path) -> None:
    words = "method.name must be dense, scl, .*magnitude, .*, not 'lottery'"
    with pytest.raises(UsageError, match=words):
        load_recipe(recipe, ["method.name=lottery"])


def test_what_contradicts_itself_is_refused(recipe: Path) -> None:
    settings = ["method.name=magnitude", "method.density=0.1", "method.begin=0.6"]
    with pytest.raises(UsageError, match=r"begin must lie below end, which is 0\.5"):
        load_recipe(recipe, settings)


@pytest.mark.parametrize(
    ("method", "final_from"),
    [
        ("magnitude", 71),
        ("rigl", 90),
        ("str", 100),
        ("dense", 0),
        ("imp", 54),
        ("projection", 71),
        ("npn", 80),
        ("l0", 100),
        ("from_scratch", 51),
    ],
)
def test_masks_are_final_when_no_later_update_can_change_them(
    method: str, final_from: int, recipe: Path
) -> None:
    """Of 100 updates, the 71st is the first at progress 0.7: that is when magnitude ends."""
    chosen = load_recipe(recipe, [f"method.name={method}", *METHODS.get(method, ())]).method
    final = [step for step in range(101) if chosen.masks_are_final(Schedule(), step, 100)]
    assert final == list(range(final_from, 101))
