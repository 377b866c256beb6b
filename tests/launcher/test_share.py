"""Method share in real runs: from a sparse run to few values, whose file needs no sharing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launcher.errors import UsageError
from launcher.recipe.load import load_recipe
from sclcore.export import load_huffman
from tests.launcher.conftest import finish, launch, summary, train
from tests.launcher.export.exports import export

SETTINGS = ("method.name=share", "method.values=6", "optim.epochs=3", "optim.lr=0.005")


@pytest.fixture(scope="module")
def shared(undisturbed: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that starts from a sparse one."""
    run_dir = tmp_path_factory.mktemp("share") / "run"
    own = (f"init.weights={undisturbed}", "checkpoint.every_steps=17", "checkpoint.keep=99")
    code, output = finish(launch(train(recipe, run_dir, *SETTINGS, *own)))
    assert code == 0, output
    assert "does not keep its zeros" not in output
    return run_dir


def test_the_structure_is_that_of_the_sparse_run(shared: Path, undisturbed: Path) -> None:
    found, before = summary(shared), summary(undisturbed)
    assert (found["live"], found["method"]) == (before["live"], "share")
    # 6 values in each layer, of which the convolutions had hundreds.
    assert found["top1"] > before["top1"] - 0.1
    weights, structure = (load_file(run / "model.safetensors") for run in (shared, undisturbed))
    for name, weight in weights.items():
        if weight.ndim > 1:
            assert torch.equal(weight != 0, structure[name] != 0), name
            assert len(weight[weight != 0].unique()) <= 6, name


def test_its_file_needs_no_further_sharing(shared: Path, tmp_path: Path) -> None:
    report = export(shared, tmp_path / "export", "sham,compact")
    read, written = (
        load_huffman(tmp_path / "export/model.sham"),
        load_file(shared / "model.safetensors"),
    )
    assert all(torch.equal(read[name], value) for name, value in written.items())
    sizes = {size["what"]: size["bytes"] for size in report["sizes"]}
    assert sizes["sham"] < min(sizes["compact"], sizes["dense, gzip"])


def test_it_resumes_bit_for_bit(
    shared: Path, undisturbed: Path, recipe: Path, tmp_path: Path
) -> None:
    """From update 17 of 42, on two ranks."""
    place = f"checkpoint.resume={shared / 'checkpoints/step-00000017'}"
    own = (*SETTINGS, f"init.weights={undisturbed}", place)
    code, output = finish(launch(train(recipe, tmp_path / "resumed", *own)))
    assert code == 0, output
    ours, theirs = (f / "model.safetensors" for f in (tmp_path / "resumed", shared))
    assert ours.read_bytes() == theirs.read_bytes()


def test_one_rank_is_two_to_rounding(
    shared: Path, undisturbed: Path, recipe: Path, tmp_path: Path
) -> None:
    own = (*SETTINGS, f"init.weights={undisturbed}")
    code, output = finish(launch(train(recipe, tmp_path / "one", *own, ranks=1)))
    assert code == 0, output
    one, two = (load_file(f / "model.safetensors") for f in (tmp_path / "one", shared))
    for name, weight in one.items():
        # Gradients differ by the order of a sum, 1e-7 of them; ReLU and pooling may turn that into
        # another gradient of single pixels.
        assert torch.allclose(weight, two[name], rtol=0, atol=1e-2), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sharded_state_is_refused_before_anything_starts(stage: int, recipe: Path) -> None:
    with pytest.raises(UsageError, match=rf"method share needs whole .* must be 0, not {stage}"):
        load_recipe(recipe, [*SETTINGS, f"engine.zero_stage={stage}"])
