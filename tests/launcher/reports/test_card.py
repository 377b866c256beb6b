"""The model card: what the Hub reads of it, and that what it says to do, does."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from launcher.export.asked import Options
from launcher.export.write import export
from launcher.folder.results import read_run
from launcher.reports.card import write_card
from tests.launcher.conftest import summary


@pytest.fixture(scope="module")
def exported(smooth_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("card") / "out"
    export(Options(smooth_run, ("safetensors",), out))
    return out


def test_the_hub_reads_the_front_matter(exported: Path, smooth_run: Path) -> None:
    front = ModelCard.load(exported / "README.md").data.to_dict()
    assert front["library_name"] == "timm" and "sparse" in front["tags"]
    [model] = front["model-index"]
    [result] = model["results"]
    assert result["dataset"]["name"] == "digits"
    shown = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert shown == {
        "top-1 accuracy, %": round(100 * summary(smooth_run)["top1"], 4),
        "top-5 accuracy, %": round(100 * summary(smooth_run)["top5"], 4),
    }


def test_the_loading_snippet_runs_as_written(
    exported: Path, smooth_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [code] = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    assert code.startswith("import timm\n") and "launcher" not in code
    monkeypatch.chdir(exported)
    names: dict[str, object] = {}
    exec(code, names)
    model = names["model"]
    assert isinstance(model, torch.nn.Module) and not model.training
    expected = load_file(smooth_run / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_its_numbers_are_those_of_the_run(exported: Path, smooth_run: Path) -> None:
    text = (exported / "README.md").read_text()
    origin = json.loads((smooth_run / "origin.json").read_text())
    started = json.loads((smooth_run / "environment.jsonl").read_text().splitlines()[-1])
    assert f"| data manifest, SHA-256 | {origin['data']['fingerprint']} |" in text
    assert f"| initial weights, SHA-256 | {origin['initial_weights_hash']} |" in text
    assert f"torch {started['packages']['torch']}," in text
    assert f"| {summary(smooth_run)['live']:,} of {summary(smooth_run)['connections']:,} |" in text
    assert "| λ | 0.3 |" in text and "lam: 0.3" in text
    for layer in read_run(smooth_run).layers:
        assert f"| `{layer.name}` | {layer.connections:,} | {layer.live:,} |" in text
    picture = (smooth_run / "summary.png").read_bytes()
    assert "(summary.png)" in text and (exported / "summary.png").read_bytes() == picture


def test_an_unfinished_run_says_so(smooth_run: Path, exported: Path, tmp_path: Path) -> None:
    """Without a summary, a picture or a record of its start, and of a model that is not timm's."""
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    out.mkdir()
    shutil.copy(smooth_run / "metrics.jsonl", run)
    recipe = (smooth_run / "recipe.yaml").read_text()
    recipe = recipe.replace("vit_tiny_patch16_224", "small_convnet")
    (run / "recipe.yaml").write_text(re.sub(r"  kwargs:\n(    .*\n)+", "  kwargs: {}\n", recipe))
    report = json.loads((exported / "export.json").read_text())
    report["source"] |= {"finished": False, "step": 40}
    card = ModelCard.load(write_card(run, out, report))
    front = card.data.to_dict()
    assert front["library_name"] == "pytorch" and "model-index" not in front
    assert "**Training had not finished: this is step 40.**" in card.text
    assert "| data manifest, SHA-256 | not recorded |" in card.text
    assert "from launcher.models import ModelConfig, create_model" in card.text
    assert not (out / "summary.png").exists()
