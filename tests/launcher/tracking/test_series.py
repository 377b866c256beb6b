"""Every series that is promised is in the files of a real run, and in the document."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from launcher.folder.results import read_run
from launcher.tracking.series import SERIES, Series
from tests.launcher.conftest import ROOT, Start, finish, summary, train
from tests.launcher.tracking.wandb_files import history_of, items_of, of_type, records_of

LAYERS = [*(f"features.{i}.weight" for i in (0, 3, 7)), "classifier.weight"]
FROZEN_FROM = 0.6 * 8


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return read_run(run_dir).metrics


def is_evaluation(line: dict[str, Any]) -> bool:
    return "val/top1" in line


def expected(series: Series, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines in which a series is promised."""
    kinds = {"line": (False,), "epoch": (True,), "both": (False, True)}[series.at]
    return [
        line
        for line in lines
        if is_evaluation(line) in kinds
        # The first line after the freeze may be about updates before it.
        and not (series.while_learning and line["epoch"] > FROZEN_FROM)
    ]


def wandb_records(run_dir: Path) -> list[Any]:
    [folder] = (run_dir / "wandb").glob("offline-run-*")
    [records] = records_of(run_dir, folder.name.rsplit("-", 1)[1])
    return records


# Those of averaged weights: tests/launcher/run/test_average.py.
@pytest.mark.parametrize(
    "series", [s for s in SERIES if s.of != "ema"], ids=lambda series: series.name
)
def test_a_promised_series_is_in_metrics_jsonl(series: Series, undisturbed: Path) -> None:
    lines = expected(series, lines_of(undisturbed))
    assert len(lines) >= 4
    for name in series.names(LAYERS):
        missing = [(line["step"], line["epoch"]) for line in lines if name not in line]
        assert missing == [], name
        values = [line[name] for line in lines]
        if name == "masks/histogram":
            assert all(len(counts) == 40 for counts in values)
        else:
            assert all(isinstance(value, int | float) for value in values), values


def test_what_is_recorded_is_promised(undisturbed: Path) -> None:
    promised = {name for series in SERIES for name in series.names(LAYERS)}
    recorded = {key for line in lines_of(undisturbed) for key in line}
    assert recorded - promised == {"step", "epoch", "time"}


def test_wandb_has_what_metrics_jsonl_has(undisturbed: Path) -> None:
    lines, history = lines_of(undisturbed), history_of(wandb_records(undisturbed))
    # The last row holds the charts.
    assert len(history) == len(lines) + 1
    for line, row in zip(lines, history, strict=False):
        for key, value in line.items():
            if key == "masks/histogram":
                assert row[f"{key}/_type"] == "histogram"
                assert row[f"{key}/values"] == value and len(row[f"{key}/bins"]) == 41
            elif key != "time":
                assert row[key] == value, key


def test_wandb_knows_axes_and_bests(undisturbed: Path) -> None:
    metrics = {m.name or m.glob_name: m for m in of_type(wandb_records(undisturbed), "metric")}
    assert metrics["*"].step_metric == "step"
    for series in SERIES:
        if series.best is None:
            assert series.name not in metrics
        else:
            kept = metrics[series.name].summary
            assert metrics[series.name].step_metric == "step"
            assert (kept.max, kept.min, kept.last) == (
                series.best == "max",
                series.best == "min",
                True,
            )


def test_wandb_has_charts_and_tables(undisturbed: Path) -> None:
    records = wandb_records(undisturbed)
    row = history_of(records)[-1]
    [files] = (undisturbed / "wandb").glob("offline-run-*/files")

    def table(name: str) -> dict[str, Any]:
        assert row[f"{name}/_type"] == "table-file"
        return json.loads((files / row[f"{name}/path"]).read_text())

    evaluations = [line for line in lines_of(undisturbed) if is_evaluation(line)]
    by_layer = table("charts/density_by_layer")
    assert by_layer["columns"] == ["step", "epoch", "layer", "density"]
    assert by_layer["data"] == [
        [line["step"], line["epoch"], layer, line[f"density/{layer}"]]
        for line in evaluations
        for layer in LAYERS
    ]
    accuracy = table("charts/accuracy_density_table")
    assert accuracy["columns"] == ["step", "epoch", "density", "macs", "top1", "top5"]
    assert [r[2] for r in accuracy["data"]] == [e["connections/density"] for e in evaluations]
    assert [r[4] for r in accuracy["data"]] == [e["val/top1"] for e in evaluations]
    # The custom chart that draws the one over the other.
    config = [items_of(c.update) for c in of_type(records, "config")]
    chart = next(v for c in config for k, v in c.items() if k.endswith("charts/accuracy_density"))
    assert chart["panel_config"]["fieldSettings"] == {"x": "density", "y": "top1"}
    for name in ("masks", "summary"):
        assert row[f"charts/{name}/_type"] == "image-file"
        written = (files / row[f"charts/{name}/path"]).read_bytes()
        assert written == (undisturbed / f"{name}.png").read_bytes()


def test_wandb_has_the_model_with_its_origin(undisturbed: Path) -> None:
    records = wandb_records(undisturbed)
    [model] = [a for a in of_type(records, "artifact") if a.type == "model"]
    contents = {entry.path: Path(entry.local_path) for entry in model.manifest.contents}
    assert contents.keys() == {
        *("model.safetensors", "layers.csv", "recipe.yaml"),
        *("masks.png", "summary.png"),
    }
    # Uploaded from where they are, so that nothing is there twice, from wherever it is done.
    assert contents["model.safetensors"] == (undisturbed / "model.safetensors").resolve()
    metadata = json.loads(model.metadata)
    assert metadata["mask_hash"] == summary(undisturbed)["mask_hash"]
    origin = json.loads((undisturbed / "origin.json").read_text())["data"]
    assert metadata["data"]["fingerprint"] == origin["fingerprint"]
    config = items_of(of_type(records, "run")[0].config.update)
    assert config["data_set"] == metadata["data"]
    # All that is to be uploaded lies in the run's folder.
    staged = [
        Path(entry.local_path)
        for artifact in of_type(records, "artifact")
        for entry in artifact.manifest.contents
    ]
    assert all(path.is_relative_to(undisturbed.resolve()) and path.exists() for path in staged)


def test_the_series_agree_with_the_summary(undisturbed: Path) -> None:
    last, result = lines_of(undisturbed)[-1], summary(undisturbed)
    assert last["connections/live"] == result["live"]
    assert last["connections/density"] == result["density"]
    assert last["connections/macs"] == result["macs"]
    assert last["connections/macs_share"] == result["macs"] / result["macs_dense"]
    assert (last["val/top1"], last["val/top5"]) == (result["top1"], result["top5"])


def test_the_series_tell_how_masks_are_learned(undisturbed: Path) -> None:
    lines = [line for line in lines_of(undisturbed) if not is_evaluation(line)]
    assert max(line["masks/imbalance_before"] for line in lines if line["epoch"] < 4) > 2
    # One divisor for the network leaves features as they are to each other.
    for line in (line for line in lines if line["epoch"] < 4):
        assert line["masks/imbalance_after"] == pytest.approx(line["masks/imbalance_before"])
    assert all(0 <= line["train/top1"] <= line["train/top5"] <= 1 for line in lines)
    # As many flips as it takes: what is dead at the end died once more than it revived.
    result = summary(undisturbed)
    flips, back = (sum(line[f"masks/{key}"] for line in lines) for key in ("flips", "revivals"))
    assert flips - 2 * back == result["connections"] - result["live"]
    assert [line["masks/flips"] for line in lines if line["epoch"] > FROZEN_FROM + 1] != []
    assert all(line["masks/flips"] == 0 for line in lines if line["epoch"] > FROZEN_FROM + 1)
    histograms = [line["masks/histogram"] for line in lines_of(undisturbed) if is_evaluation(line)]
    # At first all are near 1, in the last bins; more and more of them come to lie below 0.
    dead = [sum(counts[:20]) / sum(counts) for counts in histograms]
    assert dead[0] < 0.1 and dead[-1] == pytest.approx(1 - result["density"], abs=0.05)
    for line in lines:
        seconds = line["speed/step_s"]
        assert seconds > 0
        assert line["speed/images_per_s"] == pytest.approx(96 / seconds)
        assert 0 <= line["speed/data_wait"] <= 1


@pytest.mark.parametrize(
    "method",
    [
        {"name": "dense"},
        {"name": "magnitude", "density": 0.2},
    ],
    ids=lambda method: method["name"],
)
def test_other_methods_have_what_applies_to_them(
    method: dict[str, Any], recipe: Path, tmp_path: Path, start: Start
) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(f"base: {recipe}\nname: other\nmethod: {json.dumps(method)}\n")
    run_dir = tmp_path / "run"
    settings = ("optim.epochs=2", "tracking.wandb=offline")
    code, output = finish(start(train(path, run_dir, *settings, ranks=1)))
    assert code == 0, output
    has_masks = method["name"] != "dense"
    lines = lines_of(run_dir)
    recorded = {key for line in lines for key in line} - {"step", "epoch", "time"}
    wanted = {
        name
        for series in SERIES
        if series.of == "all" or (series.of == "masks" and has_masks)
        for name in series.names(LAYERS)
    }
    assert recorded == wanted
    result = summary(run_dir)
    assert lines[-1]["connections/density"] == result["density"]
    assert lines[-1]["connections/macs"] == result["macs"]
    assert (run_dir / "masks.png").exists() == has_masks
    [model] = [a for a in of_type(wandb_records(run_dir), "artifact") if a.type == "model"]
    assert "model.safetensors" in {entry.path for entry in model.manifest.contents}
    if has_masks:
        flips = sum(line.get("masks/flips", 0) for line in lines)
        assert flips >= result["connections"] - result["live"] > 0


def test_the_document_lists_the_series() -> None:
    text = (ROOT / "docs" / "tracking.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \|", text, re.MULTILINE)
    at = {"line": "line", "epoch": "evaluation", "both": "both"}
    of = {"all": "", "ema": "ema", "masks": "with masks", "scl": "scl"}
    assert [(name, when.strip(), meaning.strip()) for name, when, meaning in rows] == [
        (s.name, ", ".join(filter(None, [at[s.at], of[s.of]])), s.meaning) for s in SERIES
    ]
