from __future__ import annotations

import json
import logging
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from pydantic import ValidationError

from launcher.folder.results import Run
from launcher.recipe.tracking import TrackingConfig
from launcher.tracking import Tracker, wandb_run
from launcher.tracking.charts import charts_of
from launcher.tracking.identity import shown_name
from launcher.tracking.mode import resolve_mode
from tests.launcher.tracking.wandb_files import history_of, items_of, of_type, records_of

RECIPE = {"model": {"name": "resnet50"}, "optim": {"lr": 0.1, "epochs": 3}}
FAKE_KEY = "deadbeef" * 5


@pytest.fixture(autouse=True)
def _no_key_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield
    # The service reads the environment once, when it starts.
    wandb.teardown()


def _tracker(run_dir: Path, wandb_mode: str = "off", **options: Any) -> Tracker:
    config = TrackingConfig.model_validate({"wandb": wandb_mode, "tags": ["t"], "notes": "why"})
    options = {"run_name": "trial"} | options
    return Tracker(run_dir, config, recipe=RECIPE, **options)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _steps(run_dir: Path) -> list[int]:
    return [line["step"] for line in _lines(run_dir / "metrics.jsonl")]


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = [r for r in caplog.records if r.name.startswith("scl.")]
    return [r.getMessage() for r in ours if r.levelno >= logging.WARNING]


# --- the local record --------------------------------------------------------------------------


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    tracker = _tracker(tmp_path)
    before = time.time()
    tracker.log({"train/loss": 0.5, "connections/live": 12}, step=10, epoch=0.25)
    (line,) = _lines(tmp_path / "metrics.jsonl")
    # The line's time is rounded to milliseconds, so it may lie half of one after the true time.
    assert before - 0.001 <= line.pop("time") <= time.time() + 0.001
    assert line == {"step": 10, "epoch": 0.25, "train/loss": 0.5, "connections/live": 12}
    tracker.close()


def test_numbers_of_other_libraries_and_no_numbers(tmp_path: Path) -> None:
    tracker = _tracker(tmp_path)
    odd = {
        "numpy": np.float32(0.5),
        "tensor": torch.tensor(3.0),
        "nan": float("nan"),
        "inf": torch.tensor(float("inf")),
    }
    tracker.log(odd, step=1, epoch=0)
    tracker.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=refuse)
    assert (line["numpy"], line["tensor"], line["nan"], line["inf"]) == (0.5, 3.0, None, None)


def test_resuming_moves_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    tracker = _tracker(tmp_path)
    for step in (10, 20, 20, 30, 40):
        tracker.log({"x": step}, step=step, epoch=0)
    tracker.close()
    # A kill in mid-line.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "epo')

    tracker = _tracker(tmp_path, resume_step=20)
    tracker.log({"x": 30.5}, step=30, epoch=0)
    tracker.close()
    assert _steps(tmp_path) == [10, 20, 20, 30]
    assert _lines(tmp_path / "metrics.jsonl")[-1]["x"] == 30.5
    discarded = _lines(tmp_path / "metrics.discarded.jsonl")
    assert [line.get("step") for line in discarded] == [30, 40, None]
    assert discarded[-1] == {"unreadable": '{"step": 50, "epo'}

    # Once more: the discarded file grows, nothing in it is overwritten.
    _tracker(tmp_path, resume_step=20).close()
    assert _steps(tmp_path) == [10, 20, 20]
    assert len(_lines(tmp_path / "metrics.discarded.jsonl")) == 4


def test_starting_anew_discards_all_and_resuming_at_the_end_nothing(tmp_path: Path) -> None:
    tracker = _tracker(tmp_path)
    tracker.log({}, step=0, epoch=0)
    tracker.log({}, step=10, epoch=1)
    tracker.close()
    _tracker(tmp_path, resume_step=10).close()
    assert _steps(tmp_path) == [0, 10]
    assert not (tmp_path / "metrics.discarded.jsonl").exists()
    _tracker(tmp_path).close()
    assert _steps(tmp_path) == []
    assert len(_lines(tmp_path / "metrics.discarded.jsonl")) == 2


def test_summary(tmp_path: Path) -> None:
    tracker = _tracker(tmp_path)
    tracker.summary({"top1": 0.9, "bad": float("nan"), "artifacts": {"model": "m.pt"}, "n": [1]})
    tracker.close()
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written == {"top1": 0.9, "bad": None, "artifacts": {"model": "m.pt"}, "n": [1]}


class _FillingDisk:
    """Takes half of the first line, then nothing, then everything again."""

    closed = False

    def __init__(self) -> None:
        self.content = b""
        self.calls = 0

    def write(self, data: bytes) -> int:
        self.calls += 1
        if self.calls == 1:
            self.content += data[: len(data) // 2]
            return len(data) // 2
        if self.calls in (2, 3):
            raise OSError(28, "No space left on device")
        self.content += data
        return len(data)


def test_full_disk_costs_lines_never_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = _tracker(tmp_path)
    tracker._lines._file.close()
    disk = _FillingDisk()
    tracker._lines._file = disk  # type: ignore[assignment]
    for step in range(5):
        tracker.log({"x": 1.0}, step=step, epoch=0)
    first, *rest = disk.content.decode().splitlines()
    assert first.startswith('{"step": 0')
    assert [json.loads(line)["step"] for line in rest] == [3, 4]
    (warning,) = _warnings(caplog)
    assert "No space left" in warning


# --- W&B ---------------------------------------------------------------------------------------


def test_offline_run_holds_series_config_and_axis(tmp_path: Path) -> None:
    tracker = _tracker(tmp_path, "offline")
    for step in (10, 20):
        tracker.log({"train/loss": 1 / step, "bad": float("nan")}, step=step, epoch=step / 40)
    tracker.summary({"top1": 0.75})
    tracker.close()

    (records,) = records_of(tmp_path, tracker.wandb_id)
    run = of_type(records, "run")[0]
    config = items_of(run.config.update)
    assert {key: config[key] for key in RECIPE} == RECIPE
    assert (run.display_name, run.project, list(run.tags), run.notes) == (
        f"trial {tmp_path.name}",
        "scl",
        ["t"],
        "why",
    )
    history = history_of(records)
    assert [(h["step"], h["epoch"], h["train/loss"]) for h in history] == [
        (10, 0.25, 0.1),
        (20, 0.5, 0.05),
    ]
    metrics = of_type(records, "metric")
    assert any(m.glob_name == "*" and m.step_metric == "step" for m in metrics)
    assert any(items_of(s.update).get("top1") == 0.75 for s in of_type(records, "summary"))
    assert [e.exit_code for e in of_type(records, "exit")] == [0]


def test_resuming_continues_the_same_wandb_run(tmp_path: Path) -> None:
    first = _tracker(tmp_path, "offline")
    first.log({"x": 1.0}, step=10, epoch=0)
    first.close(exit_code=1)
    # Folders are named by the second.
    time.sleep(1.1)
    second = _tracker(tmp_path, "offline", resume_step=10, wandb_id=first.wandb_id)
    second.log({"x": 2.0}, step=20, epoch=0)
    second.close()

    assert second.wandb_id == first.wandb_id
    before, after = records_of(tmp_path, first.wandb_id)
    assert [h["step"] for h in history_of(before) + history_of(after)] == [10, 20]
    assert {of_type(r, "run")[0].run_id for r in (before, after)} == {first.wandb_id}
    assert _steps(tmp_path) == [10, 20]
    pattern = second.sync_command
    assert pattern == f"wandb sync {tmp_path}/wandb/offline-run-*-{first.wandb_id}"


@pytest.mark.parametrize("sweep", [None, "s1"])
def test_wandbs_variables_are_honoured_and_a_resume_stays_in_the_run(
    sweep: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as variables:
        variables.setenv("WANDB_RUN_ID", "abc123")
        variables.setenv("WANDB_NAME", "my trial")
        variables.setenv("WANDB_TAGS", "a, b")
        variables.setenv("WANDB_RUN_GROUP", "night")
        if sweep:
            variables.setenv("WANDB_SWEEP_ID", sweep)
        first = _tracker(tmp_path, "offline")
        first.close(exit_code=1)
        wandb.teardown()
        # W&B keeps some for its own children.
        for name in [n for n in os.environ if n.startswith("WANDB_") and n != "WANDB_DATA_DIR"]:
            variables.delenv(name)
    assert first.wandb_id == "abc123"
    time.sleep(1.1)
    second = _tracker(tmp_path, "offline", wandb_id=first.wandb_id, wandb_said=first.wandb_said)
    second.close()
    runs = [of_type(records, "run")[0] for records in records_of(tmp_path, "abc123")]
    assert len(runs) == 2
    for run in runs:
        assert (run.run_id, run.display_name, run.run_group) == ("abc123", "my trial", "night")
        assert sorted(run.tags) == ["a", "b", "t"]
    assert runs[0].sweep_id == (sweep or "")
    folders = shlex.split(first.sync_command or "")[-1]
    assert len([*Path(folders).parent.glob(Path(folders).name)]) == 2


def test_runs_of_one_recipe_in_several_folders_have_several_names(tmp_path: Path) -> None:
    names = {
        "runs/digits_scl": "digits_scl",
        "runs/digits_scl-1234": "digits_scl-1234",
        "runs/lam0.2": "digits_scl lam0.2",
    }
    for folder, name in names.items():
        assert shown_name("digits_scl", tmp_path / folder) == name


def test_off_touches_no_wandb(tmp_path: Path) -> None:
    tracker = _tracker(tmp_path)
    tracker.log({"x": 1.0}, step=1, epoch=0)
    tracker.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]
    assert (tracker.wandb_mode, tracker.sync_command, tracker.url) == ("off", None, None)
    assert tracker.wandb_id != _tracker(tmp_path).wandb_id


def _assert_no_key_in(folder: Path) -> None:
    wandb.teardown()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if FAKE_KEY.encode() in path.read_bytes()] == []


def test_the_key_reaches_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    tracker = _tracker(tmp_path / "run", "offline")
    tracker.log({"x": 1.0}, step=1, epoch=0)
    tracker.summary({"top1": 1.0})
    tracker.close()
    _assert_no_key_in(tmp_path / "run")


def test_unreachable_server_leaves_an_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    # Port 9 of this machine: refused at once, as behind a firewall.
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(wandb_run, "INIT_TIMEOUT_S", 2.0)
    tracker = _tracker(tmp_path, "online")
    tracker.log({"x": 1.0}, step=1, epoch=0)
    tracker.close()
    assert tracker.wandb_mode == "offline"
    (records,) = records_of(tmp_path, tracker.wandb_id)
    assert [h["x"] for h in history_of(records)] == [1.0]
    assert _steps(tmp_path) == [1]
    (warning,) = _warnings(caplog)
    assert "cannot start online" in warning and "\n" not in warning
    _assert_no_key_in(tmp_path)


def test_broken_wandb_leaves_the_local_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("no service")

    monkeypatch.setattr(wandb, "init", broken)
    tracker = _tracker(tmp_path, "offline")
    tracker.log({"x": 1.0}, step=1, epoch=0)
    tracker.summary({"top1": 1.0})
    tracker.close()
    assert tracker.wandb_mode == "off"
    assert _steps(tmp_path) == [1]
    (warning,) = _warnings(caplog)
    assert "no service" in warning


def test_wandb_failing_in_mid_run_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class BreaksOnLog:
        url, id = None, "x"

        def define_metric(self, *_: Any, **__: Any) -> None: ...

        def log(self, _values: Any) -> None:
            raise RuntimeError("service died")

    monkeypatch.setattr(wandb, "init", lambda **_: BreaksOnLog())
    tracker = _tracker(tmp_path, "offline")
    for step in range(3):
        tracker.log({"x": 1.0}, step=step, epoch=0)
    tracker.summary({})
    tracker.close()
    assert _steps(tmp_path) == [0, 1, 2]
    (warning,) = _warnings(caplog)
    assert "service died" in warning


class _Online:
    """Stands in for an online run: no server is at hand. Keeps what it is given."""

    url, id = "https://w.local/run", "x"

    def __init__(self, broken: str = "") -> None:
        self.broken = broken
        self.used: list[Any] = []
        self.kept: list[Any] = []
        self.rows: list[dict[str, Any]] = []

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def finish(self, **_: Any) -> None: ...

    def log(self, values: dict[str, Any]) -> None:
        if self.broken == "charts" and any(key.startswith("charts/") for key in values):
            raise RuntimeError("no charts today")
        self.rows.append(values)

    def use_artifact(self, artifact: Any) -> None:
        if self.broken == "data":
            raise RuntimeError("no lineage today")
        self.used.append(artifact)

    def log_artifact(self, artifact: Any) -> None:
        self.kept.append(artifact)


def _finish_online(run_dir: Path, run: _Online, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    tracker = _tracker(run_dir, "online")
    tracker.log({"val/top1": 0.5, "connections/density": 0.1}, step=5, epoch=1)
    tracker.charts([])
    model = run_dir / "model.safetensors"
    model.write_bytes(b"weights")
    data = {"dataset": "scikit-learn digits/8x8", "fingerprint": "abc", "samples": 3}
    tracker.model([model], {"top1": 0.5, "bad": float("nan")}, data)
    tracker.log({"val/top1": 0.6}, step=6, epoch=2)
    tracker.close()


def test_online_the_run_uses_its_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _Online()
    _finish_online(tmp_path, run, monkeypatch)
    [data], [model] = run.used, run.kept
    assert (data.type, model.type, model.name) == ("dataset", "model", "trial")
    assert data.name == "scikit-learn-digits-8x8" and data.metadata["fingerprint"] == "abc"
    assert model.metadata["data"]["fingerprint"] == "abc" and model.metadata["bad"] is None
    # The same data in another run is the same version.
    again = _Online()
    _finish_online(tmp_path / "again", again, monkeypatch)
    assert again.used[0].digest == data.digest


@pytest.mark.parametrize("broken", ["charts", "data"])
def test_what_comes_on_top_fails_without_the_rest(
    broken: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = _Online(broken)
    _finish_online(tmp_path, run, monkeypatch)
    assert len(run.kept) == 1 and run.rows[-1]["step"] == 6
    assert len(run.used) == (broken != "data")
    (warning,) = _warnings(caplog)
    assert "today" in warning and "going on without it" not in warning


def test_a_long_course_is_thinned_out_and_keeps_its_end(tmp_path: Path) -> None:
    layers = {f"density/layer{i}": 0.5 for i in range(100)}
    metrics = [{"step": i, "epoch": i, "val/top1": 0.5, **layers} for i in range(1, 301)]
    [table] = charts_of(Run({}, metrics, []), []).tables
    assert len(table.rows) == 10_000
    assert table.rows[-1] == [300, 300, "layer99", 0.5]


@pytest.mark.parametrize(
    ("wanted", "environment", "netrc", "mode"),
    [
        ("auto", {}, None, "offline"),
        ("auto", {"WANDB_API_KEY": FAKE_KEY}, None, "online"),
        ("auto", {}, "api.wandb.ai", "online"),
        ("auto", {}, "github.com", "offline"),
        ("auto", {"WANDB_BASE_URL": "https://w.local:8080"}, "w.local:8080", "online"),
        ("auto", {"WANDB_BASE_URL": "https://w.local:8080"}, "api.wandb.ai", "offline"),
        ("auto", {"WANDB_API_KEY": FAKE_KEY, "WANDB_MODE": "offline"}, None, "offline"),
        ("auto", {"WANDB_API_KEY": FAKE_KEY, "WANDB_MODE": "disabled"}, None, "off"),
        ("auto", {"WANDB_MODE": "nonsense"}, None, "offline"),
        ("off", {"WANDB_API_KEY": FAKE_KEY, "WANDB_MODE": "online"}, None, "off"),
        # Without a key W&B would ask the terminal; a batch job has nobody to answer.
        ("online", {}, None, "offline"),
        ("auto", {"WANDB_MODE": "online"}, None, "offline"),
    ],
)
def test_mode(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wanted: Any,
    environment: dict[str, str],
    netrc: str | None,
    mode: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if netrc:
        (tmp_path / "netrc").write_text(f"machine {netrc}\n login user\n password {FAKE_KEY}\n")
        (tmp_path / "netrc").chmod(0o600)
    assert resolve_mode(wanted) == mode


def test_config_refuses_what_it_does_not_know() -> None:
    assert TrackingConfig().wandb == "auto"
    for wrong in ({"wandb": "yes"}, {"log_every": 0}, {"projct": "x"}):
        with pytest.raises(ValidationError):
            TrackingConfig.model_validate(wrong)
