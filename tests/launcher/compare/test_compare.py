from __future__ import annotations

import csv
import json
import math
import os
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from launcher import cli
from launcher.compare import check_out, compare_runs
from launcher.compare.courses import PANELS, band_of
from launcher.compare.pareto import pareto_front
from launcher.compare.table import COLUMNS, MILLISECONDS, as_csv, as_json, shown, tables
from launcher.errors import UsageError
from launcher.folder.results import ReportError
from launcher.models import SmallConvNet
from launcher.start.sweep import load_sweep, plan_sweep
from tests.launcher.compare.compared import DENSE, Made, ThreePasses, scl, write_run, write_sweep
from tests.launcher.conftest import ROOT, Start, finish, summary, train


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("runs"))


# --- the front ---------------------------------------------------------------------------------


def test_the_front_keeps_what_nothing_beats() -> None:
    #        front         beaten        front         as dear, worse  front
    points = [(0.1, 0.9), (0.2, 0.85), (0.3, 0.95), (0.3, 0.94), (1.0, 0.97)]
    assert pareto_front(points) == [0, 2, 4]


def test_of_equal_accuracy_the_cheaper_is_on_the_front() -> None:
    assert pareto_front([(0.5, 0.9), (0.2, 0.9)]) == [1]


def test_duplicates_are_on_the_front_together() -> None:
    assert pareto_front([(0.2, 0.9), (0.1, 0.5), (0.2, 0.9)]) == [1, 0, 2]


def test_a_single_run_and_none() -> None:
    assert pareto_front([(0.2, 0.9)]) == [0]
    assert pareto_front([]) == []


# Few values, so that ties and duplicates are common.
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5))))
def test_the_front_by_its_definition(points: list[tuple[int, int]]) -> None:
    def beaten(point: tuple[int, int]) -> bool:
        return any(o[0] <= point[0] and o[1] >= point[1] and o != point for o in points)

    front = pareto_front(points)
    assert sorted(front) == [i for i, point in enumerate(points) if not beaten(point)]
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


# --- configurations ----------------------------------------------------------------------------


def test_runs_that_differ_in_seed_are_one_line(runs: Path) -> None:
    comparison = compare_runs([runs])
    assert [(c.name, c.seeds) for c in comparison.configurations] == [
        ("dense", "0, 1, 2"),
        ("scl-lam0.1", "0, 1, 2"),
        ("scl-lam0.4", "0, 1, 2"),
    ]
    stat = comparison.configurations[2].stat("top1")
    values = [summary(runs / f"scl-lam0.4-seed{seed}")["top1"] for seed in range(3)]
    assert stat is not None and (stat.mean, stat.std, stat.n) == (
        pytest.approx(statistics.fmean(values)),
        pytest.approx(statistics.stdev(values)),
        3,
    )


def test_only_what_differs_is_a_difference(runs: Path) -> None:
    assert compare_runs([runs]).differences == {
        "method.name": ["dense", "scl", "scl"],
        "method.lam": ["–", 0.1, 0.4],
    }


def test_unfinished_runs_are_in_no_mean_and_not_on_the_front(runs: Path, tmp_path: Path) -> None:
    better = Made("young", scl(0.9), top1=1.0, density=0.001, stopped_at=4)
    comparison = compare_runs([runs, write_run(tmp_path / "young", better)])
    assert comparison.configurations[2].state == "1 more unfinished"
    young = comparison.configurations[3]
    assert not young.finished and young.state == "epoch 4 of 8"
    assert young.mean("top1") == pytest.approx(1 - math.exp(-3))
    assert comparison.front("density") == [2, 1, 0] == comparison.front("macs")
    assert any("2 of 11 runs have not finished" in text for text in comparison.warnings)


def test_the_same_run_is_read_once(runs: Path) -> None:
    one = runs / "dense-seed0"
    relative = os.path.relpath(one)
    assert len(compare_runs([one, runs, relative]).runs) == 10


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for lam in (0.1, 0.2):
        write_run(tmp_path / f"{lam}", Made("same", scl(lam), density=lam))
    names = [c.name for c in compare_runs([tmp_path]).configurations]
    assert names == ["same lam=0.2", "same lam=0.1"]


def test_a_recipe_of_an_older_version_means_its_defaults(tmp_path: Path) -> None:
    write_run(tmp_path / "new", Made(seed=0))
    old = write_run(tmp_path / "old", Made(seed=1)) / "recipe.yaml"
    lines = [line for line in old.read_text().splitlines() if "granularity" not in line]
    assert len(lines) < len(old.read_text().splitlines())
    old.write_text("\n".join(lines))
    assert [c.seeds for c in compare_runs([tmp_path]).configurations] == ["0, 1"]


def test_without_a_recipe_a_run_stands_alone(runs: Path, tmp_path: Path) -> None:
    bare = write_run(tmp_path / "bare", Made("bare"))
    (bare / "recipe.yaml").unlink()
    comparison = compare_runs([bare, runs / "dense-seed0"])
    assert [(c.name, c.seeds) for c in comparison.configurations] == [
        ("dense-seed0"[:-6], "0"),
        ("bare", "1 run"),
    ]


@pytest.mark.parametrize(
    ("sort", "first"),
    [("density", 1.0), ("top1", 1.0), ("macs", 1.0), ("time", 0.2), ("throughput", 1.0)],
)
def test_the_order_of_the_lines(runs: Path, sort: str, first: float) -> None:
    configurations = compare_runs([runs], sort).configurations
    keys = {"time": ("train_seconds", 1), "throughput": ("images_per_s", -1)}
    key, sign = keys.get(sort, (sort, -1))
    values = [c.mean(key) for c in configurations]
    assert values == sorted(values, key=lambda v: sign * (v or 0))
    assert configurations[0].densities()["conv1"] == pytest.approx(first, abs=0.01)


# --- what is said ------------------------------------------------------------------------------


def test_the_table_says_what_the_summaries_say(runs: Path) -> None:
    comparison = compare_runs([runs])
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    for table in tables(comparison):
        console.print(table)
    text = console.export_text()
    [line] = [line for line in text.splitlines() if "scl-lam0.4" in line and "both" in line]
    assert "95.40 ± 0.40 %" in line and "0, 1, 2 (1 more unfinished)" in line
    assert "method.lam" in text


def test_numbers_with_their_deviation(runs: Path) -> None:
    c = compare_runs([runs]).configurations[1]
    assert shown(c.stat("train_seconds"), "train_seconds") == "11.0 ± 1.0 s"
    assert shown(c.stat("images_per_s"), "images_per_s") == "2,100 ± 0"
    assert shown(None, "top1") == "–"
    one = compare_runs([runs / "dense-seed0"]).configurations[0]
    assert shown(one.stat("density"), "density") == "100 %"


def test_the_cost_is_that_of_all_epochs_and_passes(runs: Path, tmp_path: Path) -> None:
    """A further forward pass is a third of an update, which is a forward and a backward one."""
    thorough = {"name": f"{ThreePasses.__module__}:ThreePasses"}
    write_run(tmp_path / "a", Made("a", thorough, epochs=6))
    write_run(tmp_path / "b", Made("b", DENSE, epochs=6))
    write_run(tmp_path / "c", Made("c", scl(0.2), epochs=7, stopped_at=3))
    found = {c.name: c.stat("cost") for c in compare_runs([tmp_path]).configurations}
    assert {name: stat and stat.mean for name, stat in found.items()} == {"a": 10, "b": 6, "c": 7}
    assert shown(found["a"], "cost") == "10"
    gone = thorough["name"].replace("ThreePasses", "Gone")
    text = (tmp_path / "a" / "recipe.yaml").read_text()
    (tmp_path / "a" / "recipe.yaml").write_text(text.replace(thorough["name"], gone))
    [lost] = [c for c in compare_runs([tmp_path]).configurations if c.name == "a"]
    assert shown(lost.stat("cost"), "cost") == "–"


def test_csv_and_json_hold_every_number(runs: Path) -> None:
    comparison = compare_runs([runs])
    lines = list(csv.DictReader(as_csv(comparison).splitlines()))
    values = json.loads(as_json(comparison))
    for line, c, entry in zip(
        lines, comparison.configurations, values["configurations"], strict=True
    ):
        stat = c.stat("macs")
        assert stat is not None
        assert float(line["macs"]) == entry["statistics"]["macs"]["mean"] == stat.mean
        assert float(line["macs_std"]) == stat.std
    assert [line["method.lam"] for line in lines] == ["–", "0.1", "0.4"]
    assert len(values["configurations"][2]["runs"]) == 4


def test_other_data_is_warned_of(runs: Path, tmp_path: Path) -> None:
    moved = Made("moved", data="elsewhere/digits")
    other = Made("other", data="runs/data/digits", fingerprint="77aa")
    same = compare_runs([runs, write_run(tmp_path / "moved", moved)])
    assert not any("data sets" in text for text in same.warnings)
    mixed = compare_runs([runs, write_run(tmp_path / "other", other)])
    assert any("2 different data sets" in text for text in mixed.warnings)


def test_other_networks_seeds_given_twice_and_lost_accuracies_are_warned_of(tmp_path: Path) -> None:
    write_run(tmp_path / "a", Made("a"))
    write_run(tmp_path / "b", Made("b"))
    write_run(tmp_path / "c", Made("c", scl(0.5), layers={"fc": 100}))
    write_run(tmp_path / "d", Made("d", scl(9), top1=math.nan))
    text = " ".join(compare_runs([tmp_path]).warnings)
    assert "seed 0 more than once" in text and "differ in size" in text
    assert "d finished without an accuracy" in text


# --- the command -------------------------------------------------------------------------------


def test_the_command_writes_everything(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["compare", str(runs), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out.count("scl-lam0.4") == 2 and "warning: 1 of 10 runs" in said.out
    assert "\x1b" not in said.out
    for name in ("accuracy.png", "curves.png", "layers.png"):
        with Image.open(out / name) as image:
            assert image.width > 800 and len(image.convert("RGB").getcolors(1 << 24) or []) > 50
    # Again into the same folder, and then into one with a file of somebody else's.
    assert cli.main(["compare", str(runs / "dense-seed0"), "--out", str(out)]) == 0
    assert json.loads((out / "table.json").read_text())["configurations"][0]["name"] == "dense"
    (out / "table.json").write_text("{}")
    assert cli.main(["compare", str(runs), "--out", str(out)]) == 2
    assert "which scl compare did not write" in capsys.readouterr().err
    assert (out / "table.json").read_text() == "{}"


def test_accuracy_over_milliseconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each run's network in the native runtime; a run without one says so and stays in the rest."""
    torch.manual_seed(0)
    for name, density in (("full", 1.0), ("few", 0.02), ("gone", 0.5)):
        folder = write_run(tmp_path / "runs" / name, Made(name, scl(density), density=density))
        state = SmallConvNet(num_classes=10, in_chans=1).state_dict()
        for weight in (w for w in state.values() if w.ndim > 1):
            weight *= torch.rand_like(weight) < density
        if name != "gone":
            save_file(state, folder / "model.safetensors")
    command = ["compare", str(tmp_path / "runs"), "--milliseconds", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    assert "warning: gone has no latency: " in capsys.readouterr().out
    found = json.loads((tmp_path / "out/table.json").read_text())["configurations"]
    times = {c["name"]: c["statistics"].get("milliseconds") for c in found}
    assert times["gone"] is None
    # A fiftieth of the multiplications: seen was a fifth of the time, which nothing else shares.
    assert 0 < times["few"]["mean"] < times["full"]["mean"]
    rows = list(csv.DictReader((tmp_path / "out/table.csv").read_text().splitlines()))
    assert float(rows[0]["milliseconds"]) > 0
    page = (tmp_path / "out/index.html").read_text()
    assert "Top-1 accuracy over milliseconds" in page and ">ms</button>" in page
    with Image.open(tmp_path / "out/accuracy.png") as image:
        assert image.width == 3 * 560
    assert "milliseconds" not in as_csv(compare_runs([tmp_path / "runs"]))


def _spoil(folder: Path, name: str) -> Path:
    (write_run(folder, Made()) / name).write_text("{torn\nx")
    return folder


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: p / "none", "There is no run folder"),
        (lambda p: p, "is no run folder and holds none"),
        (lambda p: write_run(p / "a", Made()) / "summary.json", "is a file"),
        (lambda p: write_run(p / "a", Made(stopped_at=2)), "None of the 1 runs has finished"),
        (lambda p: _spoil(p / "a", "summary.json"), "summary.json cannot be read"),
        (lambda p: _spoil(p / "a", "layers.csv"), "layers.csv is not a table of layers"),
        (lambda p: _spoil(p / "a", "recipe.yaml"), "recipe.yaml cannot be read"),
    ],
    ids=["missing", "empty", "file", "unfinished", "summary", "layers", "recipe"],
)
def test_bad_input_is_one_sentence(
    make: Any, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["compare", str(make(tmp_path)), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and said.rstrip().endswith(".")
    assert not out.exists()


def test_an_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="is not a folder"):
            check_out(out)
    with pytest.raises(ReportError, match="No run was given"):
        compare_runs([])


def test_the_examples_of_the_document(
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (ROOT / "docs" / "compare.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "lambdas").symlink_to(runs)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    said = capsys.readouterr().out
    assert said.rstrip().endswith("n=3)") and "dense Stat(mean=0.985" in said
    assert (tmp_path / "runs" / "compare" / "index.html").exists()
    for column in (*COLUMNS, MILLISECONDS):
        assert f"\n| {column.title} |" in text
    sweep = ROOT / "docs" / "figures" / "compare_sweep.yaml"
    assert len(plan_sweep(load_sweep(sweep), sweep)) == 15


@pytest.mark.timeout(300)
def test_two_trained_runs(start: Start, smooth: Path, smooth_run: Path, tmp_path: Path) -> None:
    """What training really writes is what is compared."""
    dense = tmp_path / "dense"
    command = train(smooth, dense, "method.name=dense", "optim.epochs=2", ranks=1)
    code, output = finish(start(command))
    assert code == 0, output
    comparison = compare_runs([smooth_run, dense])
    for c, folder in zip(comparison.configurations, (dense, smooth_run), strict=True):
        for key in ("top1", "density", "live", "macs", "train_seconds"):
            stat = c.stat(key)
            assert stat is not None and (stat.mean, stat.std) == (summary(folder)[key], None)
        assert (c.mean("images_per_s") or 0) > 0
        assert all(band_of(c, panel) is not None for panel in PANELS)
    assert {"method.name", "engine.ranks", "optim.epochs"} >= comparison.differences.keys()
    assert comparison.runs[0].data == comparison.runs[1].data
    assert comparison.warnings == []
