"""The Python API: what `scl` does, from a script or a notebook."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
import yaml
from nbclient import NotebookClient

from launcher.api import TrainedRun, compare, load_run, train
from launcher.errors import RunError, UsageError
from tests.launcher.conftest import ROOT, summary

NOTEBOOK = ROOT / "docs" / "tutorial" / "notebook.ipynb"


def test_train_is_scl_train_and_goes_on_where_it_was(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = yaml.safe_load(recipe.read_text())
    settings = {"run_dir": tmp_path / "run", "optim.epochs": 3, "method.exclude": ["classifier"]}
    metrics = tmp_path / "run" / "metrics.jsonl"

    def interrupt(seconds: float) -> None:
        time.sleep(seconds)
        if metrics.exists() and metrics.read_bytes():
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("launcher.api.time", SimpleNamespace(sleep=interrupt))
        train(values, settings)
    log = tmp_path / "run" / "train.log"
    assert "stopped by SIGINT at step" in log.read_text()

    run = train(values, settings)
    assert run.folder == tmp_path / "run" and run.top1 == summary(run.folder)["top1"]
    assert run.recipe["method"]["exclude"] == ["classifier"]
    assert "3.0/3 epochs" in capsys.readouterr().err
    assert "small: small_convnet, scl, 1,437 samples" in log.read_text()
    assert "continues at step" in log.read_text()
    # Finished: the same call returns it, and trains nothing.
    before = metrics.read_bytes()
    assert train(values, settings, progress=False).summary == run.summary
    assert metrics.read_bytes() == before


def test_what_is_wrong_is_the_sentence_of_the_command(recipe: Path, tmp_path: Path) -> None:
    folder = {"run_dir": tmp_path / "run"}
    with pytest.raises(UsageError, match=r"small\.yaml: unknown key 'method.lamb'; did you mean"):
        train(recipe, {"method.lamb": 1, **folder})
    # What only the processes find.
    with pytest.raises(UsageError, match=r"there is no folder .*none.train; pack a data set there"):
        train(recipe, {"data.path": tmp_path / "none", **folder}, progress=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(Exception, match="There is no run folder"):
        load_run(tmp_path / "none")
    assert issubclass(RunError, Exception)


def test_a_run_says_what_its_folder_says(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load_run(undisturbed)
    assert (run.top1, run.density) == (
        summary(undisturbed)["top1"],
        summary(undisturbed)["density"],
    )
    epochs, density = run.series("connections/density")
    assert epochs[-1] == 8 and density[-1] == pytest.approx(run.density)
    model = run.model()
    assert not model.training
    weights = [p for p in model.parameters() if p.ndim > 1]
    assert sum(int(torch.count_nonzero(w)) for w in weights) == run.summary["live"]
    assert run.evaluate()["results"]["top1"] == pytest.approx(run.top1)
    assert f"{run.summary['live']:,}" in repr(run)
    assert "<th>density</th>" in run._repr_html_()
    comparison = compare([run, undisturbed], out=tmp_path / "compared")
    assert len(comparison.configurations) == 1, "one run, named twice"
    assert "small" in capsys.readouterr().out
    assert (tmp_path / "compared" / "index.html").is_file()


def test_the_document_names_what_there_is() -> None:
    text = (ROOT / "docs" / "python_api.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, object] = {}
    exec(code.splitlines()[0], names)
    assert (names["train"], names["load_run"], names["compare"]) == (train, load_run, compare)
    public = {*vars(TrainedRun), *TrainedRun.__dataclass_fields__} - {"results"}
    for name in (name for name in public if not name.startswith("_")):
        assert re.search(rf"`{name}[`(]", text), name


@pytest.mark.long
def test_the_notebook_is_executed(tmp_path: Path) -> None:
    shutil.copy(NOTEBOOK, tmp_path / "notebook.ipynb")
    notebook = nbformat.read(tmp_path / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") for cell in notebook.cells), "is kept without its outputs"
    setup = f"import sys\nsys.path.insert(0, {str(ROOT)!r})"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(setup))
    NotebookClient(notebook, timeout=280, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = json.dumps([cell.get("outputs") for cell in notebook.cells])
    assert "notebook_dense" in outputs
    pattern = r"density ([\d.]+)% at epoch 0\.5, ([\d.]+)% at epoch 10\.0"
    [(first, last)] = re.findall(pattern, outputs)
    assert float(first) > 95 and 17 < float(last) < 23, "steered to 20 %"
    live, said = re.findall(r"\((\d+), (\d+)\)", outputs)[-1]
    assert live == said and int(live) < 0.25 * 14_000
