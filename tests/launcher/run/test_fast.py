"""The fast path: the same training, and what cannot work refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from launcher.checkpoints import checkpoint
from launcher.errors import UsageError
from launcher.recipe.engine import EngineConfig
from launcher.recipe.load import load_recipe
from launcher.run import fast
from launcher.run.inputs import open_inputs
from tests.launcher.conftest import (
    Start,
    assert_same_to_rounding,
    finish,
    mask_variables,
    scl,
    summary,
)
from tests.launcher.test_resume import segment


def test_channels_last_is_saved_as_it_is_named(recipe: Path, tmp_path: Path, start: Start) -> None:
    """Masks and weights by position, whatever their order in memory; a plain run goes on so."""
    run_dir = tmp_path / "run"
    settings = ("optim.epochs=4", "model.kwargs.width=16")
    segment(start, recipe, run_dir, *settings, "engine.channels_last=true", ranks=2, stop=40)
    found = checkpoint.find(run_dir / "checkpoints")
    assert found is not None
    state, masks = checkpoint.load_part(found, "model"), mask_variables(run_dir)
    dead = 0
    for name, mask in masks.items():
        assert torch.equal(state[name] != 0, mask > 0), name
        dead += int((mask <= 0).sum())
    assert dead > 100
    segment(start, recipe, run_dir, *settings, ranks=1)
    assert summary(run_dir)["live"] < summary(run_dir)["connections"] - dead / 2


def test_computing_activations_again_changes_nothing(
    smooth: Path, tmp_path: Path, start: Start
) -> None:
    settings = ("optim.epochs=2", "engine.zero_stage=1")
    for name in ("true", "false"):
        again = f"engine.recompute={name}"
        segment(start, smooth, tmp_path / name, *settings, again, ranks=2)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("true", "false")]
    assert files[0] == files[1]


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_compiled_network_learns_what_it_learns_otherwise(
    smooth: Path, tmp_path: Path, start: Start
) -> None:
    """Compiled, interrupted, and once more; evaluated and exported like any."""
    compiled, plain = tmp_path / "compiled", tmp_path / "plain"
    settings = ("optim.epochs=2", "engine.step_timeout_s=0")
    how = (*settings, "engine.compile=default")
    segment(start, smooth, compiled, *how, ranks=1, stop=17)
    segment(start, smooth, compiled, *how, ranks=1)
    segment(start, smooth, plain, *settings, ranks=1)
    # The compiler fuses what rounds in between.
    assert_same_to_rounding(compiled, plain)
    names = [load_file(run / "model.safetensors").keys() for run in (compiled, plain)]
    assert names[0] == names[1]
    code, output = finish(
        start(scl("export", compiled, "--format", "csv", "--out", tmp_path / "o"))
    )
    assert code == 0, output


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("not in a graph")
        return self.layer(x) if x.tolist() else x


def test_a_model_that_cannot_be_traced_is_refused() -> None:
    config = EngineConfig(compile="default")
    with pytest.raises(UsageError, match=r"engine\.compile=default: odd cannot be traced"):
        fast.check_fast(config, Untraceable(), torch.zeros(1, 3), "odd")
    fast.check_fast(config, nn.Linear(3, 2).to("meta"), torch.zeros(1, 3, device="meta"), "plain")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["engine.compile=fastest"], r"engine\.compile: should be off, default or max-autotune"),
        (["engine.recompute=true"], r"engine\.recompute: small_convnet cannot compute"),
        (
            ["engine.recompute=true", "model={name: cifar_resnet20}"],
            r"engine\.recompute: cifar_resnet20 has batch norm",
        ),
        (
            ["engine.channels_last=true", "engine.zero_stage=1"],
            r"engine\.channels_last does nothing with engine\.zero_stage=1",
        ),
        (
            ["engine.channels_last=true", "engine.zero_stage=3"],
            r"engine\.channels_last does nothing with engine\.zero_stage=3",
        ),
        (
            ["engine.compile=default", "engine.zero_stage=3"],
            r"engine\.compile=default and engine\.zero_stage=3 do not go together",
        ),
    ],
)
def test_what_cannot_work_is_refused(recipe: Path, settings: list[str], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        open_inputs(load_recipe(recipe, settings), 1)


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast.shutil, "which", lambda name: None)
    config = EngineConfig(compile="max-autotune")
    with pytest.raises(UsageError, match=r"compile=max-autotune needs a C\+\+ compiler"):
        fast.check_fast(config, nn.Linear(3, 2), torch.zeros(1, 3), "plain")
