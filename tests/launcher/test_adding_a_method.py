"""The method of docs/adding_a_method.md, from outside: trained, resumed, compared, exported."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from launcher.errors import UsageError
from launcher.recipe.describe import describe
from launcher.recipe.load import load_recipe
from sclcore import connection_groups, registry
from sclcore.driver.method import Method
from sclcore.driver.optimizer import Driver
from tests.launcher.conftest import ANEW, Start, finish, launch, scl, summary, train

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs/examples/methods"
NAME = "snip:Snip"
SETTINGS = (f"method.name={NAME}", "method.density=0.1", "optim.epochs=3")


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, as the document starts them: nothing but PYTHONPATH says where the method is."""
    folder = tmp_path_factory.mktemp("snip") / "whole"
    every = ("checkpoint.every_steps=17", "checkpoint.keep=99")
    process = _begin(train(recipe, folder, *SETTINGS, *every))
    code, output = finish(process)
    assert code == 0, output
    return folder


def _begin(command: list[str]) -> subprocess.Popen[str]:
    return launch(command, ANEW, PYTHONPATH=str(FOLDER))


def test_the_document_shows_the_file() -> None:
    text = (ROOT / "docs/adding_a_method.md").read_text()
    [shown] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert shown == (FOLDER / "snip.py").read_text()
    assert len([line for line in shown.splitlines() if line.strip()]) < 35


def test_it_trains_to_its_density_on_two_ranks(run: Path) -> None:
    found = summary(run)
    assert found["method"] == "snip" and found["world_size"] == 2
    assert found["live"] == round(0.1 * found["connections"])
    # Of ten classes, after three epochs with a tenth of the connections.
    assert found["top1"] > 0.25
    # The run can be continued and read by anybody: its recipe says where the method is.
    assert yaml.safe_load((run / "recipe.yaml").read_text())["method"]["name"] == NAME


def test_it_resumes_bit_for_bit(run: Path, recipe: Path, tmp_path: Path) -> None:
    place = f"checkpoint.resume={run / 'checkpoints/step-00000017'}"
    code, output = finish(_begin(train(recipe, tmp_path / "resumed", *SETTINGS, place)))
    assert code == 0, output
    ours, theirs = (f / "model.safetensors" for f in (tmp_path / "resumed", run))
    assert ours.read_bytes() == theirs.read_bytes()


def test_it_is_compared_and_exported(run: Path, tmp_path: Path) -> None:
    for command in (
        scl("compare", run, "--out", tmp_path / "compared"),
        scl("export", run, "--format", "compact,csv", "--out", tmp_path / "exported"),
    ):
        code, output = finish(_begin(command))
        assert code == 0, output
    assert "snip" in (tmp_path / "compared/index.html").read_text()
    report = json.loads((tmp_path / "exported/export.json").read_text())
    assert report["live"] == summary(run)["live"]


def test_without_its_package_the_run_is_refused_in_a_sentence(run: Path, start: Start) -> None:
    code, output = finish(start(scl("train", "--recipe", run / "recipe.yaml")))
    assert code == 2
    assert f"method.name '{NAME}' cannot be imported: No module named 'snip'" in output


@pytest.mark.usefixtures("importable")
def test_mistakes_in_its_settings_are_sentences_as_ever(recipe: Path) -> None:
    words = r"method\.density: should be a number above 0 and up to 1, not 2"
    with pytest.raises(UsageError, match=words):
        load_recipe(recipe, [f"method.name={NAME}", "method.density=2"])
    words = r"unknown key 'method\.densty'; did you mean 'method\.density'"
    with pytest.raises(UsageError, match=words):
        load_recipe(recipe, [f"method.name={NAME}", "method.density=0.2", "method.densty=0.2"])
    with pytest.raises(UsageError, match="snip:Snap' cannot be imported: module 'snip' has no"):
        load_recipe(recipe, ["method.name=snip:Snap"])
    with pytest.raises(UsageError, match="snip:largest_of_all' is no method: it should be a sub"):
        load_recipe(recipe, ["method.name=snip:largest_of_all"])


def test_a_name_that_is_nearly_right_is_offered(recipe: Path) -> None:
    with pytest.raises(UsageError, match="not 'magnitud'; did you mean 'magnitude'"):
        load_recipe(recipe, ["method.name=magnitud"])


@pytest.mark.usefixtures("importable")
def test_an_installed_package_names_it_by_an_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Path
) -> None:
    """Metadata as pip writes it, of a package that has the document's lines in its own."""
    metadata = tmp_path / "snip_method-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: snip-method\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[scl.methods]\nsnip = snip:Snip\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._installed.cache_clear()
    try:
        method = load_recipe(recipe, ["method.name=snip", "method.density=0.2"]).method
        assert (method.name, type(method).__name__) == ("snip", "Snip")
        assert "method, with name: snip: Connection sensitivity" in describe()
    finally:
        registry._installed.cache_clear()


@pytest.mark.usefixtures("importable")
def test_in_a_loop_of_ones_own() -> None:
    from snip import Snip  # type: ignore[import-not-found]

    torch.manual_seed(0)
    model = nn.Linear(20, 10)
    optimizer = Driver(Snip(density=0.05), connection_groups(model), lr=0.1)
    images = torch.randn(32, 20)
    model(images).square().mean().backward()
    assert model.weight.grad is not None
    wanted = (model.weight * model.weight.grad).abs().flatten().topk(10).indices
    optimizer.step()
    assert model.weight.flatten().nonzero().flatten().tolist() == sorted(wanted.tolist())


def test_every_method_of_the_house_says_what_it_is() -> None:
    for name, kind in registry.known_methods().items():
        assert issubclass(kind, Method)
        assert kind.__doc__ and kind.__doc__.splitlines()[0].endswith("."), name
        undescribed = [key for key, field in kind.model_fields.items() if not field.description]
        assert not undescribed, (name, undescribed)
