"""`scl sweep`: real runs from one file, several at a time."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import cli
from launcher.errors import UsageError
from launcher.start.sweep import load_sweep, plan_sweep
from sclcore.methods.scl import SCLMethod
from tests.launcher.conftest import LAUNCHER_VARIABLES, Start, finish, scl, wait_until


@pytest.fixture(autouse=True)
def no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def write(folder: Path, **values: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="session")
def short(recipe: Path) -> Path:
    """Two epochs in which masks die."""
    path = recipe.with_name("short.yaml")
    path.write_text(f"base: {recipe.name}\nname: short\nmethod: {{mask_lr: 0.05}}\n")
    return path


def test_lists_multiply_out_and_own_settings_go_first(short: Path, tmp_path: Path) -> None:
    path = write(
        tmp_path,
        name="both",
        seeds=[0, 1],
        set={"optim.epochs": 2, "schedule.lr_milestones": [0.5, 0.7]},
        runs=[
            {
                "recipe": str(short),
                "label": "scl",
                "set": {"method.lam": [0.1, 1e-5], "method.proxy": ["identity", "softplus"]},
            },
            {"recipe": str(short), "set": {"method": {"name": "dense"}, "optim.epochs": 3}},
        ],
    )
    runs = {run.name: run.recipe for run in plan_sweep(load_sweep(path), path)}
    assert list(runs) == [
        f"{name}-seed{seed}"
        for seed in (0, 1)
        for name in (
            "scl-lam0.1-proxyidentity",
            "scl-lam0.1-proxysoftplus",
            "scl-lam1e-05-proxyidentity",
            "scl-lam1e-05-proxysoftplus",
            "short",
        )
    ]
    run = runs["scl-lam1e-05-proxysoftplus-seed1"]
    assert isinstance(run.method, SCLMethod)
    assert run.method.lam == 1e-5 and run.method.proxy == "softplus"
    assert run.seed == 1 and run.optim.epochs == 2 and run.schedule.lr_milestones == [0.5, 0.7]
    assert run.folder == Path("runs/both/scl-lam1e-05-proxysoftplus-seed1")
    assert run.tracking.group == "both"
    assert runs["short-seed0"].method.name == "dense" and runs["short-seed0"].optim.epochs == 3
    # From the command line: where the runs go, and what holds for all whatever the file says.
    moved = plan_sweep(load_sweep(path, tmp_path), path, ["optim.epochs=9", "data.path=/x"])
    assert {run.recipe.folder.parent for run in moved} == {tmp_path / "both"}
    assert {(run.recipe.optim.epochs, run.recipe.data.path) for run in moved} == {(9, "/x")}
    with pytest.raises(UsageError, match="run_dir is not to be set"):
        plan_sweep(load_sweep(path), path, ["run_dir=runs/all"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": [1]}, "unknown key 'seed'; did you mean 'seeds'?"),
        ({"runs": []}, "runs: "),
        ({"runs": [{"recipe": "{short}", "sets": {}}]}, "'runs.0.sets'; did you mean 'set'?"),
        ({"runs": [{"label": "x"}]}, "the key 'runs.0.recipe' is missing"),
        ({"runs": [{"recipe": "none.yaml"}]}, "cannot read the recipe"),
        ({"set": {"method.lamb": 1}}, "did you mean 'lam'?"),
        ({"set": {"seed": 3}}, "seed is not to be set"),
        ({"seeds": [4, 4]}, "two runs would be called short-seed4"),
        ({"set": {"optim.global_batch_size": 99999}}, "global_batch_size"),
        ({"set": {"model.name": "resnett"}}, "model.name"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_touches_nothing(
    change: dict[str, Any],
    said: str,
    short: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = {"name": "bad", "out": str(tmp_path / "out"), "runs": [{"recipe": str(short)}]}
    values |= json.loads(json.dumps(change).replace("{short}", str(short)))
    assert cli.main(["sweep", str(write(tmp_path, **values))]) == 2
    # On a busy machine it says that it is still checking, too.
    lines = [line for line in capsys.readouterr().err.splitlines() if "so far" not in line]
    [error] = lines
    assert error.startswith("error: ") and said in error, error
    assert not (tmp_path / "out").exists()


def test_two_by_two_runs_once(
    start: Start, short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(
        tmp_path,
        name="two_by_two",
        out=str(tmp_path / "out"),
        seeds=[0, 1],
        set={"optim.epochs": 2},
        runs=[{"recipe": str(short), "label": "scl", "set": {"method.lam": [0.3, 1.5]}}],
    )
    names = [f"scl-lam{lam}-seed{seed}" for seed in (0, 1) for lam in ("0.3", "1.5")]
    assert cli.main(["sweep", str(path), "--dry-run"]) == 0
    assert [line.split("/")[-1] for line in capsys.readouterr().out.splitlines()] == [
        f"{name}  (new)" for name in names
    ]
    assert cli.main(["sweep", str(path), "--task", "4"]) == 2
    assert "has 4 runs, 0 to 3; a job array of all is --array=0-3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    # As a task of an array, whatever the sweep varies: the same run in the same place.
    code, said = finish(start(scl("sweep", path, "--task", "2")))
    assert code == 0, said
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == [names[2]]

    code, said = finish(start(scl("sweep", path, "--jobs", "2")))
    assert code == 0, said
    assert "4 runs, 3 to train, 2 at a time" in said
    assert all(f"{name}: top-1 " in said for name in names if name != names[2])
    assert said.splitlines()[-1].endswith(f"scl compare {tmp_path / 'out'}")
    density = {n: json.loads((tmp_path / "out" / n / "summary.json").read_text()) for n in names}
    for seed in (0, 1):
        few, many = (density[f"scl-lam{lam}-seed{seed}"]["density"] for lam in ("1.5", "0.3"))
        assert few < many
    assert density[names[0]]["top1"] != density[names[2]]["top1"], "the seed reached the run"

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    assert cli.main(["sweep", str(path)]) == 0
    assert "4 runs, 0 to train" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before


def test_a_failed_run_is_shown_and_the_others_go_on(
    start: Start, short: Path, shards: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(shards, broken)
    for shard in (broken / "train").glob("*.tar"):
        # As long as before, so that only reading tells.
        shard.write_bytes(bytes(shard.stat().st_size))
    path = write(
        tmp_path,
        name="failing",
        out=str(tmp_path / "out"),
        set={"optim.epochs": 1},
        runs=[
            {"recipe": str(short), "label": "bad", "set": {"data.path": str(broken)}},
            {"recipe": str(short), "label": "good"},
        ],
    )
    code, said = finish(start(scl("sweep", path, "--jobs", "1")))
    assert code == 1, said
    assert "bad-seed0 ended with exit code 1; the end of" in said and "train.log" in said
    assert "    error: " in said, "the reason, out of the log"
    assert "2/2 good-seed0: top-1" in said
    assert "error: 1 of 2 runs failed: bad-seed0" in said


def trained(run_dir: Path) -> bool:
    """Whether a line about updates is there: the file itself comes before the first of them."""
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() and bool(metrics.read_text())


def test_stopped_runs_are_saved_and_continue(
    start: Start, short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    path = write(
        tmp_path,
        name="stopped",
        out=str(out),
        seeds=[0, 1],
        set={"optim.epochs": 200},
        runs=[{"recipe": str(short), "label": "run"}],
    )
    process = start(scl("sweep", path, "--jobs", "2"))
    wait_until(
        lambda: all(trained(out / f"run-seed{seed}") for seed in (0, 1)), what="both runs to train"
    )
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 128 + signal.SIGTERM, said
    assert "the same command continues" in said and "failed" not in said
    assert cli.main(["sweep", str(path), "--dry-run"]) == 0
    assert capsys.readouterr().out.count("continues at step ") == 2


def test_a_rank_of_another_launcher_starts_no_sweep(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.start.sweep_jobs import check_runs

    path = write(tmp_path, name="ranked", runs=[{"recipe": str(short)}])
    runs = plan_sweep(load_sweep(path), path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="no rank of one"):
        check_runs(runs)
