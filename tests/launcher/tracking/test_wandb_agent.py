"""`wandb agent` drives `scl train`: wandb's own agent, with a stand-in for its server."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import cli
from launcher.arguments import spelled_out
from launcher.recipe.load import load_recipe
from launcher.recipe.trial import as_trial
from tests.launcher.conftest import ANEW, ROOT, Start, finish
from tests.launcher.graphql import server
from tests.launcher.tracking.wandb_files import of_type, records_of

SWEEP = ROOT / "recipes" / "wandb_sweep.yaml"


def words_of(parameters: dict[str, Any]) -> list[str]:
    """The command of the sweep file as wandb's agent makes it of a trial's parameters."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    values = {name: {"value": value} for name, value in parameters.items()}
    made = create_sweep_command_args({"args": values})["args"]
    words = yaml.safe_load(SWEEP.read_text())["command"]
    return [word for each in words for word in (made if each == "${args}" else [each])]


def test_the_recipe_of_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = words_of({"method.lam": 0.25, "optim.lr": 0.05, "seed": 2})
    assert program == "scl" and "--method.lam=0.25" in words and "--seed=2" in words
    options = cli.parser("train").parse_args([*spelled_out(words, top_level=True)])
    recipe = load_recipe(ROOT / options.recipe, options.overrides)
    assert (recipe.method.lam, recipe.optim.lr, recipe.seed) == (0.25, 0.05, 2)  # type: ignore[attr-defined]

    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert as_trial(recipe) == recipe
    monkeypatch.setenv("WANDB_RUN_ID", "t1")
    assert as_trial(recipe).folder == Path("runs/digits_scl"), "a run of its own, in no sweep"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s9")
    trial = as_trial(recipe)
    assert trial.folder == Path("runs/digits_scl-s9/t1")
    assert as_trial(trial) == trial, "from its own recipe.yaml, it goes on where it is"


@pytest.mark.parametrize("command", ["retrain runs/a --weights new --seed=3", "bench runs/a"])
def test_other_commands_keep_their_own_options(command: str) -> None:
    assert [*spelled_out(command.split())] == command.split()


@pytest.mark.long
@pytest.mark.timeout(500)
def test_wandbs_agent_trains_trials_and_resumes_one(
    recipe: Path, tmp_path: Path, start: Start
) -> None:
    """Two trials of one command, and the first of them again, as after a preemption."""
    config = yaml.safe_load(SWEEP.read_text())
    settings = ["--set", "optim.epochs=1", "tracking.wandb=offline"]
    command = [str(recipe) if word.endswith(".yaml") else word for word in config["command"]]
    config["command"] = [*command, *settings]
    trials = {"t1": 0.2, "t2": 2.0}
    orders = [
        {"type": kind, "run_id": trial, "program": "scl", "args": _args(trials[trial])}
        for kind, trial in (("run", "t1"), ("run", "t2"), ("resume", "t1"))
    ]

    def answer(query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "CreateAgent" in query:
            assert variables["sweep"] == "s9"
            return {"createAgent": {"agent": {"id": "a1"}}}
        if "Heartbeat" in query:
            busy = json.loads(variables["runState"])
            now = [orders.pop(0)] if orders and not busy else []
            return {"agentHeartbeat": {"agent": {"id": "a1"}, "commands": json.dumps(now)}}
        sweep = {"id": "1", "name": "s9", "config": yaml.safe_dump(config), "runs": {"edges": []}}
        return {"project": {"sweep": sweep}}

    with server(answer) as online:
        path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
        agent = [sys.executable, "-m", "wandb", "agent", "--count", "3", "us/digits/s9"]
        # From a folder of its own, which the agent writes into.
        here = f"import os, sys; os.chdir({str(tmp_path)!r}); os.execv(sys.argv[1], sys.argv[1:])"
        # Four programs that import torch or wandb, one after the other.
        process = start([sys.executable, "-c", here, *agent], ANEW, PATH=path, **online)
        code, said = finish(process, timeout=400)
    assert code == 0 and not orders, said
    folder = tmp_path / "runs" / "small-s9"
    assert sorted(run.name for run in folder.iterdir()) == sorted(trials), said
    for trial, lam in trials.items():
        written = yaml.safe_load((folder / trial / "recipe.yaml").read_text())
        assert written["method"]["lam"] == lam
        [record] = [of_type(records, "run")[0] for records in records_of(folder / trial, trial)]
        assert (record.run_id, record.sweep_id) == (trial, "s9")
        # Where the upload is told to look, the folder is.
        assert f"wandb sync runs/small-s9/{trial}/wandb/offline-run-*-{trial}" in said
    assert "runs/small-s9/t1 is finished" in said, "the same trial again is the same run"


def _args(lam: float) -> dict[str, Any]:
    return {"method.lam": {"value": lam}, "seed": {"value": 1}}
