"""Recipes with `model.cut`: trained, continued, evaluated, exported; bad ones refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.shards.manifest import load_manifest
from launcher.cli import main
from launcher.export.source import open_source
from launcher.models import create_model
from launcher.models.cut import read_cut
from launcher.recipe.load import load_recipe
from launcher.run.initial import Initial, initial_model, read_initial
from sclcore.export.cut import Cut, Kept
from tests.launcher.conftest import finish, launch, summary, train


def of_first_layer(indices: list[int], model: str = "small_convnet") -> Cut:
    """The features of the first of the small ConvNet's layers that stay."""
    kept = Kept(of=8, indices=indices)
    norm = {f"features.1.{name}": {0: kept} for name in ("weight", "bias")}
    weights = {"features.0.weight": {0: kept}, "features.3.weight": {1: kept}}
    return Cut(model=model, kept=weights | norm)


@pytest.fixture(scope="module")
def cut_recipe(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small recipe, dense, of the ConvNet without its group norm (whose groups are fixed)."""
    folder = tmp_path_factory.mktemp("cut")
    kept = Kept(of=8, indices=[0, 3, 5])
    norm = ("weight", "bias", "running_mean", "running_var")
    cut = Cut(
        model="small_convnet",
        kept={f"features.1.{name}": {0: kept} for name in norm}
        | {"features.0.weight": {0: kept}, "features.3.weight": {1: kept}},
    )
    (folder / "cut.json").write_text(cut.model_dump_json())
    path = folder / "cut.yaml"
    path.write_text(
        f"base: {recipe}\n"
        "name: cut\n"
        "method: {name: dense}\n"
        f"model: {{kwargs: {{width: 8, norm: batch}}, cut: {folder}/cut.json}}\n"
    )
    return path


@pytest.fixture(scope="module")
def cut_run(cut_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of it, of two epochs."""
    run_dir = tmp_path_factory.mktemp("cut_run") / "run"
    code, output = finish(launch(train(cut_recipe, run_dir, "optim.epochs=2", ranks=1)))
    assert code == 0, output
    return run_dir


def test_a_model_with_a_cut_is_trained(cut_run: Path) -> None:
    state = load_file(cut_run / "model.safetensors")
    assert state["features.0.weight"].shape == (3, 1, 3, 3)
    assert state["features.3.weight"].shape == (16, 3, 3, 3)
    whole = sum(p.numel() for p in create_model_of(cut_run, cut=None).parameters())
    assert summary(cut_run)["parameters"] < whole
    assert summary(cut_run)["top1"] > 0.5


def create_model_of(run: Path, cut: Cut | None) -> torch.nn.Module:
    config = load_recipe(run / "recipe.yaml").model.model_copy(update={"cut": None})
    return create_model(config, num_classes=10, in_chans=1, cut=cut)


def test_a_run_is_whole_without_the_file_its_recipe_names(
    cut_run: Path, cut_recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Evaluated and exported from its own copy; the exported file says its cut itself."""
    run = tmp_path / "run"
    shutil.copytree(cut_run, run)
    text = (run / "recipe.yaml").read_text()
    named = str(cut_recipe.parent / "cut.json")
    (run / "recipe.yaml").write_text(text.replace(named, str(tmp_path / "gone.json")))
    assert main(["eval", str(run)]) == 0
    assert f"{100 * summary(run)['top1']:.2f} %" in capfd.readouterr().out
    out = tmp_path / "out"
    formats = "safetensors,compact,csv"
    assert main(["export", str(run), "--format", formats, "--out", str(out)]) == 0
    alone = tmp_path / "alone.safetensors"
    shutil.copy(out / "model.safetensors", alone)
    shutil.copy(out / "model.sclc", tmp_path / "alone.sclc")
    images = torch.randn(4, 1, 8, 8)
    expected = open_source(run).model(images)
    for file in (alone, tmp_path / "alone.sclc"):
        assert torch.equal(open_source(file).model(images), expected)
    card = (out / "README.md").read_text()
    assert "cut='cut.json'" in card and (out / "cut.json").is_file()
    assert main(["compare", str(run), "--out", str(tmp_path / "compared")]) == 0


def test_it_continues_and_ends_as_if_never_interrupted(
    cut_recipe: Path, cut_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(cut_run, run)
    first, *later = sorted((run / "checkpoints").glob("step-*"))
    assert later, "there is something to train again"
    for folder in later:
        shutil.rmtree(folder)
    for name in ("summary.json", "model.safetensors"):
        (run / name).unlink()
    code, output = finish(launch(train(cut_recipe, run, "optim.epochs=2", ranks=1)))
    assert code == 0, output
    assert f"continues at step {int(first.name.partition('-')[2]):,}" in output
    states = [load_file(folder / "model.safetensors") for folder in (run, cut_run)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_a_cut_that_changed_under_a_run_is_refused(
    cut_recipe: Path, cut_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = cut_recipe.parent / "cut.json"
    before = path.read_text()
    path.write_text(before + "\n")
    try:
        code = main(train(cut_recipe, cut_run, "optim.epochs=2", ranks=1)[3:])
    finally:
        path.write_text(before)
    assert code == 2
    assert f"{path} has changed since {cut_run} began with it" in capfd.readouterr().err


def test_weights_of_the_whole_model_and_of_the_cut_one(
    cut_recipe: Path, cut_run: Path, shards: Path, tmp_path: Path
) -> None:
    manifest = load_manifest(shards / "train")
    torch.manual_seed(1)
    whole = create_model_of(cut_run, cut=None)
    torch.save(whole.state_dict(), tmp_path / "whole.pt")
    found = {}
    for key, path in (("whole", tmp_path / "whole.pt"), ("run", cut_run)):
        recipe = load_recipe(cut_recipe, [f"init.weights={path}"])
        found[key] = initial_model(recipe, manifest, read_initial(recipe, manifest)).state_dict()
    trained = load_file(cut_run / "model.safetensors")
    assert all(torch.equal(found["run"][name], trained[name]) for name in trained)
    expected = whole.state_dict()["features.3.weight"][:, [0, 3, 5]]
    assert torch.equal(found["whole"]["features.3.weight"], expected)
    # Random ones are the whole model's, scaled where a layer has lost inputs.
    recipe = load_recipe(cut_recipe)
    random = initial_model(recipe, manifest, Initial()).state_dict()
    plain = recipe.model_copy(update={"model": recipe.model.model_copy(update={"cut": None})})
    drawn = initial_model(plain, manifest, Initial()).state_dict()
    scaled = drawn["features.3.weight"][:, [0, 3, 5]] * (8 / 3) ** 0.5
    torch.testing.assert_close(random["features.3.weight"], scaled)
    assert torch.equal(random["features.0.weight"], drawn["features.0.weight"][[0, 3, 5]])


def other(cut: Cut, **changes: object) -> str:
    return json.dumps(json.loads(cut.model_dump_json()) | changes)


KEPT = {"features.0.weight": {"0": {"of": 8, "indices": [0, 8]}}}
REFUSED = {
    "no file": (None, "cannot be read: No such file"),
    "no JSON": ("{", "is no cut: it: Invalid JSON"),
    "out of range": (other(Cut(), kept=KEPT), "indices should ascend, each once, from 0 to 7"),
    "none left": (
        other(Cut(), kept={"features.0.weight": {"0": {"of": 8, "indices": []}}}),
        "kept.features.0.weight.0.indices: List should have at least 1 item",
    ),
    "another model": (
        of_first_layer([0], "resnet18").model_dump_json(),
        "is of the model resnet18, not of small_convnet: set model.name=resnet18",
    ),
    "another size": (
        of_first_layer([0, 3]).model_dump_json().replace('"of":8', '"of":32'),
        "dimension 0 of features.0.weight is 8 in the model, 32 in the cut; give the kwargs",
    ),
    "half of a cut": (
        Cut(kept={"features.0.weight": {0: Kept(of=8, indices=[0])}}).model_dump_json(),
        "as .* cuts it does not take images",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_cuts_are_refused_in_a_sentence(
    case: str, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text, sentence = REFUSED[case]
    path = tmp_path / "cut.json"
    if text is not None:
        path.write_text(text)
    run = tmp_path / "run"
    assert main(train(recipe, run, f"model.cut={path}")[3:]) == 2
    [line] = [t for t in capfd.readouterr().err.splitlines() if t.startswith("error: ")]
    assert str(path) in line and re.search(sentence, line), line
    assert not run.exists()


def test_a_cut_is_read_as_it_was_written(cut_recipe: Path) -> None:
    cut = read_cut(cut_recipe.parent / "cut.json")
    assert cut.kept["features.3.weight"][1].indices == [0, 3, 5]
