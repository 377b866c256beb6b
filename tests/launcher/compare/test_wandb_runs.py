"""`scl compare entity/project`: wandb's own client against a server on this machine.

The server answers the few GraphQL queries that the client sends with what our runs have recorded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from launcher.compare import compare_runs
from launcher.folder.results import read_recipe, read_run
from tests.launcher.compare.compared import Made, write_run
from tests.launcher.graphql import server

ANSWERING: list[Path] = []


def _node(folder: Path) -> dict[str, Any]:
    """A run as the server gives it: configuration, summary and state."""
    run = read_run(folder)
    config = {key: {"value": value} for key, value in read_recipe(folder).items()}
    summary = dict(run.summary)
    if summary:
        # What history leaves in a summary: the last value of each series.
        summary |= {f"density/{layer.name}": layer.density for layer in run.layers}
    else:
        summary = {"val/top1": 0.5}
    texts = dict.fromkeys(("displayName", "sweepName", "group", "jobType", "commit", "notes"), "")
    return texts | {
        "id": folder.name,
        "projectId": "1",
        "name": folder.name,
        "displayName": read_recipe(folder)["name"],
        "state": "finished" if run.summary else "running",
        "config": json.dumps(config),
        "summaryMetrics": json.dumps(summary | {"_step": 3}),
        "systemMetrics": "{}",
        "tags": [],
        "readOnly": False,
        "createdAt": "2026-01-01T00:00:00",
        "heartbeatAt": "2026-01-01T00:00:00",
        "description": "",
        "historyLineCount": len(run.metrics),
        "user": {"name": "us", "username": "us"},
        "historyKeys": {},
    }


def _answer(text: str, variables: dict[str, Any]) -> dict[str, Any]:
    folders = {folder.name: folder for folder in ANSWERING}
    if "sampledHistory" in text:
        [spec] = variables["specs"]
        keys = json.loads(spec)["keys"]
        lines = [line | {"_step": i} for i, line in enumerate(_run_lines(folders, variables))]
        rows = [{key: line[key] for key in keys} for line in lines if line.keys() >= set(keys)]
        return {"project": {"run": {"sampledHistory": [rows]}}}
    if "runs(" in text:
        edges = [{"node": _node(folder), "cursor": folder.name} for folder in ANSWERING]
        page = {"endCursor": "", "hasNextPage": False}
        runs = {"edges": edges, "pageInfo": page}
        found = variables["project"] == "digits"
        project = {"internalId": "1", "runCount": len(edges), "readOnly": False, "runs": runs}
        return {"project": project if found else None}
    folder = folders.get(variables.get("name", ""))
    return {"project": {"internalId": "1", "run": folder and _node(folder)}}


def _run_lines(folders: dict[str, Path], variables: dict[str, Any]) -> list[dict[str, Any]]:
    return read_run(folders[variables["name"]]).metrics


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    with server(_answer) as variables:
        monkeypatch.delenv("WANDB_MODE", raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        yield
        import wandb

        wandb.teardown()
    ANSWERING.clear()


def test_a_project_reads_as_its_run_folders_do(online: None, tmp_path: Path) -> None:
    for seed in (0, 1):
        made = Made("scl", {"name": "scl", "lam": 1.0}, seed, 0.95 + 0.01 * seed)
        ANSWERING.append(write_run(tmp_path / "runs" / f"s{seed}", made))
    dense = Made("dense", {"name": "dense"}, density=1.0)
    ANSWERING.append(write_run(tmp_path / "runs" / "d0", dense))
    ANSWERING.append(write_run(tmp_path / "runs" / "u0", Made("young", stopped_at=3)))
    there, here = compare_runs(["us/digits"]), compare_runs([tmp_path / "runs"])
    assert [c.name for c in there.configurations] == ["dense", "scl", "young"]
    for one, other in zip(there.configurations, here.configurations, strict=True):
        assert (one.name, one.seeds, one.finished) == (other.name, other.seeds, other.finished)
        assert one.state == other.state
        for key in ("top1", "density", "live", "macs", "train_seconds", "images_per_s"):
            assert one.stat(key) == other.stat(key)
        if one.finished:
            assert one.densities() == pytest.approx(other.densities())
        for mine, theirs in zip(one.runs, other.runs, strict=True):
            for name in ("val/top1", "connections/density", "train/loss"):
                assert mine.run.series(name) == theirs.run.series(name)
    assert there.differences == here.differences
    [single] = compare_runs(["us/digits/s1"]).runs
    assert (single.place, single.value("top1")) == ("us/digits/s1", 0.96)
    # A run that is there, here and in a project, may be compared in one go.
    assert len(compare_runs([tmp_path / "runs" / "d0", "us/digits/s1"]).configurations) == 2


def test_what_is_not_there_is_one_sentence(
    online: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("us/nothing", "us/digits/none"):
        assert cli.main(["compare", name]) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if "wandb:" not in line]
        assert len(said) == 1 and f"no folder {name}, and" in said[0], said


@pytest.mark.parametrize("mode", ["", "offline"])
def test_without_a_login_nothing_is_asked(
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_MODE", mode)
    assert cli.main(["compare", "us/digits"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "wandb login" in said and "no folder us/digits" in said
