from __future__ import annotations

import errno
import json
import logging
import pickle
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from launcher.checkpoints import checkpoint as ck
from launcher.checkpoints import write as checkpoint_write
from launcher.checkpoints.manifest import CheckpointError
from launcher.recipe.checkpoint import CheckpointConfig
from tests import forkserver
from tests.launcher.checkpoints.saving import evaluation, save

REPOSITORY = Path(__file__).parents[3]


def _parts(step: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((50, 40), float(step))}, "rank-00000": {"seed": step}}


def _save(root: Path, step: int, keep: int = 2, best: bool = False) -> ck.Checkpoint:
    result = evaluation(step / 100) if best else None
    return save(
        root, step=step, parts=_parts(step), meta={"at": step}, keep=keep, evaluation=result
    )


def _steps(root: Path) -> list[int]:
    return [found.step for found in ck.list_checkpoints(root)]


def _find(root: Path) -> ck.Checkpoint:
    found = ck.find(root)
    assert found is not None
    return found


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def _flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_everything_comes_back(tmp_path: Path) -> None:
    model = {"w": torch.randn(3, 4, dtype=torch.bfloat16), "b": torch.arange(10)[2:5]}
    state = {
        "rng": torch.get_rng_state(),
        "python": random.getstate(),
        3: (1, 2.5, None, True, "text", b"bytes", {1, 2}),
        "dtype": torch.float16,
    }
    meta = {"epoch": 3, "wandb_id": "abc", "recipe": {"lr": 0.1, "sizes": [1, 2]}, "best": None}
    saved = save(tmp_path, step=7, parts={"model": model, "s": state}, meta=meta, keep=1)

    found = _find(tmp_path)
    assert found == saved
    assert (found.step, found.meta) == (7, meta)
    assert ck.verify(found.path) == []
    loaded = ck.load_part(found, "model")
    assert torch.equal(loaded["w"], model["w"]) and loaded["w"].dtype == torch.bfloat16
    assert torch.equal(loaded["b"], model["b"])
    again = ck.load_part(found, "s")
    assert torch.equal(again.pop("rng"), state.pop("rng"))
    assert again == state


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert ck.find(tmp_path) is None
    assert ck.find(tmp_path / "absent") is None
    assert ck.list_checkpoints(tmp_path / "absent") == []


def test_latest_is_preferred_to_a_later_step(tmp_path: Path) -> None:
    _save(tmp_path, 10, keep=3)
    _save(tmp_path, 20, keep=3)
    # A rewind: the run goes on from 10 and saves 15; 20 is of an abandoned line.
    _save(tmp_path, 15, keep=3)
    assert _find(tmp_path).step == 15
    assert _steps(tmp_path) == [10, 20, 15]
    _save(tmp_path, 18, keep=2)
    assert _steps(tmp_path) == [15, 18]


# --- retention ---------------------------------------------------------------------------------


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5, 6):
        _save(tmp_path, step, keep=2, best=step in (1, 3))
    assert _steps(tmp_path) == [3, 5, 6]
    assert (tmp_path / "best").read_text() == "step-00000003\n"
    assert (tmp_path / "latest").read_text() == "step-00000006\n"


def test_a_best_among_the_newest_takes_no_second_place(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _save(tmp_path, step, keep=2, best=step == 2)
    assert _steps(tmp_path) == [2, 3]


def test_damaged_ones_do_not_count_as_kept(tmp_path: Path) -> None:
    _save(tmp_path, 1, keep=2)
    damaged = _save(tmp_path, 2, keep=2)
    (damaged.path / "model.pt").unlink()
    _save(tmp_path, 3, keep=2)
    assert _steps(tmp_path) == [1, 3]
    assert (damaged.path / "rank-00000.pt").exists()


def test_same_step_twice_keeps_one_copy_the_newer(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    save(tmp_path, step=5, parts={"model": {"w": torch.ones(1)}}, meta={"at": "second"}, keep=2)
    found = _find(tmp_path)
    assert found.meta == {"at": "second"}
    assert _steps(tmp_path) == [5]
    assert ck.load_part(found, "model")["w"].item() == 1


# --- damage ------------------------------------------------------------------------------------


def _truncate(folder: Path) -> None:
    with (folder / "model.pt").open("r+b") as file:
        file.truncate(100)


DAMAGES = {
    "has 100 bytes instead of": _truncate,
    "model.pt does not match its SHA-256": lambda folder: _flip_bit(folder / "model.pt"),
    "model.pt is missing": lambda folder: (folder / "model.pt").unlink(),
    "manifest.json is missing": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json is unreadable": lambda folder: _flip_bit(folder / "manifest.json"),
    "no such folder": shutil.rmtree,
}


@pytest.mark.parametrize("complaint", DAMAGES)
def test_damage_falls_back_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, complaint: str
) -> None:
    for step in (1, 2, 3):
        _save(tmp_path, step, keep=3)
    newest = tmp_path / "step-00000003"
    DAMAGES[complaint](newest)

    assert any(complaint in problem for problem in ck.verify(newest))
    assert _find(tmp_path).step == 2
    (warning,) = _warnings(caplog)
    assert "step-00000003" in warning and complaint in warning and "step-00000002" in warning


def test_two_damaged_ones_make_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        _save(tmp_path, step, keep=3)
    _flip_bit(tmp_path / "step-00000003" / "model.pt")
    _flip_bit(tmp_path / "step-00000002" / "rank-00000.pt")
    assert _find(tmp_path).step == 1
    (warning,) = _warnings(caplog)
    assert "step-00000003" in warning and "step-00000002" in warning


@pytest.mark.parametrize("content", [None, "", "../elsewhere\n", b"\xff\xfe"])
def test_unusable_latest_falls_back_to_the_newest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str | bytes | None
) -> None:
    _save(tmp_path, 1)
    _save(tmp_path, 2)
    latest = tmp_path / "latest"
    latest.unlink()
    if content is not None:
        latest.write_bytes(content.encode() if isinstance(content, str) else content)
    assert _find(tmp_path).step == 2
    assert len(_warnings(caplog)) == 1


def test_a_sound_newest_warns_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _save(tmp_path, 1)
    _find(tmp_path)
    assert _warnings(caplog) == []


def test_all_damaged_is_an_error_never_a_fresh_start(tmp_path: Path) -> None:
    _flip_bit(_save(tmp_path, 1).path / "model.pt")
    with pytest.raises(CheckpointError, match=r"No usable checkpoint.*step-00000001.*SHA-256"):
        ck.find(tmp_path)


def test_a_changed_meta_is_noticed(tmp_path: Path) -> None:
    saved = _save(tmp_path, 1)
    manifest = saved.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"at": 1', '"at": 2'))
    assert ck.verify(saved.path) == ["manifest.json is unreadable: its checksum does not match"]


def test_another_format_is_named(tmp_path: Path) -> None:
    saved = _save(tmp_path, 1)
    manifest = saved.path / "manifest.json"
    body = {**json.loads(manifest.read_text()), "format_version": 99}
    manifest.write_text(json.dumps(body))
    assert "format 99 is newer" in ck.verify(saved.path)[0]
    manifest.write_text(json.dumps({**body, "format_version": 1}))
    assert (
        "format 1 is older than this program's 2: finish that run with"
        in (ck.verify(saved.path)[0])
    )


# --- what is refused ---------------------------------------------------------------------------


class _Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, (self.command,)


@pytest.mark.parametrize(
    "write", [torch.save, lambda tree, path: path.write_bytes(pickle.dumps(tree, protocol=2))]
)
def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path, write: Any) -> None:
    saved = _save(tmp_path, 1)
    write({"w": _Malicious(f"touch {tmp_path}/pwned")}, saved.path / "model.pt")
    with pytest.raises(CheckpointError, match="was refused"):
        ck.load_part(saved, "model")
    assert not (tmp_path / "pwned").exists()


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    parts = {"model": {"w": np.arange(3)}}
    with pytest.raises(CheckpointError, match=r"'model' holds.*numpy"):
        save(tmp_path, step=2, parts=parts, meta={}, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "pareto.json", "step-00000001"]


@pytest.mark.parametrize(
    ("parts", "meta", "message"),
    [
        ({}, {}, "without parts"),
        ({"../evil": {}}, {}, "part's name"),
        ({"model": {}}, {"x": torch.ones(1)}, "plain JSON"),
        ({"model": lambda: None}, {}, "cannot be saved"),
    ],
)
def test_impossible_saves_are_refused(
    tmp_path: Path, parts: dict[str, Any], meta: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, step=1, parts=parts, meta=meta, keep=1)
    assert ck.find(tmp_path) is None


def test_full_disk_leaves_the_old_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(tmp_path, 1)

    def full(_self: Any, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_write.HashingWriter, "write", full)
    with pytest.raises(OSError, match="No space left on device"):
        _save(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "pareto.json", "step-00000001"]
    assert _find(tmp_path).step == 1


def test_missing_or_broken_part(tmp_path: Path) -> None:
    saved = _save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"no part 'optimizer'; it has: model, rank-00000"):
        ck.load_part(saved, "optimizer")
    with pytest.raises(CheckpointError, match="no part"):
        ck.load_part(saved, "../latest")
    _truncate(saved.path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        ck.load_part(saved, "model")


# --- how a run starts --------------------------------------------------------------------------


def test_resume(tmp_path: Path) -> None:
    root, other = tmp_path / "run", tmp_path / "other"
    assert ck.resolve(root, "auto") is None
    assert ck.resolve(root, "never") is None
    _save(other, 3)
    _save(root, 1)
    for resume, step in {"auto": 1, str(other / "step-00000003"): 3, str(other): 3}.items():
        found = ck.resolve(root, resume)
        assert found is not None and found.step == step
    with pytest.raises(CheckpointError, match="resume: never"):
        ck.resolve(root, "never")
    with pytest.raises(CheckpointError, match="no such folder"):
        ck.resolve(root, str(tmp_path / "absent"))
    _flip_bit(other / "step-00000003" / "model.pt")
    with pytest.raises(CheckpointError, match="SHA-256"):
        ck.resolve(root, str(other / "step-00000003"))


def test_config_refuses_what_it_does_not_know() -> None:
    assert CheckpointConfig().resume == "auto"
    for wrong in ({"keep": 0}, {"every_epochs": 0}, {"kepp": 2}):
        with pytest.raises(ValidationError):
            CheckpointConfig.model_validate(wrong)


# --- kill -9 -----------------------------------------------------------------------------------

# Forks one child per kill from a process that has imported torch once. Python's audit events come
# right before each open, mkdir, rename, remove and rmdir: the child kills itself at the n-th.
_KILLER = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from launcher.checkpoints import checkpoint as ck
from launcher.recipe.checkpoint import CheckpointConfig
from tests.launcher.checkpoints import saving

WATCHED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}

def save(root, step, generation, size=50, best=True):
    parts = {"model": {"w": torch.full((size, 40), float(step))}, "rank-00000": {"seed": step}}
    meta = {"at": step, "generation": generation}
    evaluation = saving.evaluation(step / 100) if best else None
    saving.save(root, step=step, parts=parts, meta=meta, keep=1, evaluation=evaluation)

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid

def killed_at(n, root, step, best):
    def work():
        left = n
        def hook(event, args):
            nonlocal left
            if event in WATCHED and str(root) in str(args[0]):
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
        sys.addaudithook(hook)
        save(root, step, "new", best=best)
    _, status = os.waitpid(child(work), 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, "save failed"
        return False
    assert os.WTERMSIG(status) == signal.SIGKILL
    return True

def at_every_operation(folder, old_step, step, best):
    base = folder / "base"
    base.mkdir(parents=True)
    if old_step is not None:
        save(base, old_step, "old", best=best)
    n = 0
    while True:
        root = folder / f"kill-{n:03d}"
        shutil.copytree(base, root)
        if not killed_at(n, root, step, best):
            shutil.rmtree(root)
            return
        n += 1

def at_random_times(root, kills):
    def work():
        found = ck.find(root)
        step = found.step if found else 0
        while True:
            step += 1
            save(root, step, "new", size=20000)
    for _ in range(kills):
        pid = child(work)
        # On a busy machine the first save may take longer than any of the delays below.
        while not (root / "latest").exists():
            time.sleep(0.01)
        time.sleep(random.uniform(0.01, 0.12))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "save failed"
        latest = root / "latest"
        named = int(latest.read_text().strip()[5:13]) if latest.exists() else 0
        found = ck.find(root)
        got = found.step if found else 0
        assert got >= named, (got, named)
        if found:
            assert ck.load_part(found, "model")["w"].unique().item() == got
        print("survived", named)

folder = Path(sys.argv[1])
if sys.argv[2] == "random":
    at_random_times(folder / "run", kills=25)
else:
    old, new, best = sys.argv[2:]
    at_every_operation(folder, int(old) if old != "none" else None, int(new), best == "best")
"""


def _run_killer(*arguments: str | Path) -> str:
    command = [sys.executable, "-c", _KILLER, *map(str, arguments)]
    done = forkserver.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("old", "new", "best"), [("1", "2", "plain"), ("2", "2", "best"), ("none", "2", "plain")]
)
def test_killed_before_any_file_operation(tmp_path: Path, old: str, new: str, best: str) -> None:
    _run_killer(tmp_path, old, new, best)
    roots = sorted(tmp_path.glob("kill-*"))
    outcomes = [_outcome_after_kill(root, old, new) for root in roots]
    assert len(roots) >= 10
    # Old until the new one is published, and never old again after that.
    assert outcomes == sorted(outcomes)
    assert (outcomes[0], outcomes[-1]) == (0, 1)


def _outcome_after_kill(root: Path, old: str, new: str) -> int:
    """0 if the old state is found, 1 if the new; fails on anything else, or if saving does."""
    found = ck.find(root)
    if found is None:
        assert old == "none"
        generation = 0
    else:
        generation = 0 if found.meta["generation"] == "old" else 1
        assert found.step == int(new if generation else old)
        assert ck.load_part(found, "model")["w"].unique().item() == found.step
    if (root / "best").exists():
        assert ck.verify(root / (root / "best").read_text().strip()) == []

    _save(root, 3, keep=1, best=True)
    assert _find(root).step == 3
    left = ["best", "latest", "pareto.json", "step-00000003"]
    assert sorted(p.name for p in root.iterdir()) == left
    return generation


def test_killed_at_random_times(tmp_path: Path) -> None:
    survived = [
        int(step) for step in re.findall(r"survived (\d+)", _run_killer(tmp_path, "random"))
    ]
    assert len(survived) == 25
    assert survived == sorted(survived) and survived[-1] > 0
