"""A run that hangs ends in time, says why, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher.cluster.positions import Position, Process
from launcher.cluster.watchdog import no_store, verdict
from tests.launcher.conftest import Start, finish, processes_of, train, wait_until

TIMEOUT_S = 5
SETTINGS = (f"engine.step_timeout_s={TIMEOUT_S}", "optim.epochs=20", "tracking.log_every=1")


def test_the_rank_with_fewer_beats_is_behind() -> None:
    here = {0: Position(12, 4, "saving"), 1: Position(9, 3, "waiting for data")}
    sentence = verdict(here | {2: Position(12, 4, "saving")}, {}, 300)
    assert "rank 1 is behind, at step 3, waiting for data" in sentence
    assert "others wait at step 4, saving" in sentence


def test_ranks_that_do_not_answer_come_first() -> None:
    silent = {rank: Position(7, 2, "evaluating") for rank in range(1, 12)}
    sentence = verdict({0: Position(3, 1, "saving")}, silent, 300)
    assert "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 3 more did not answer" in sentence
    assert "rank 1 was last heard of at step 2, evaluating" in sentence
    assert "behind" not in sentence


def test_all_at_the_same_place() -> None:
    here = dict.fromkeys(range(2), Position(9, 1234, "saving"))
    assert "every rank is at step 1,234, saving" in verdict(here, {}, 300)
    assert "rank 0" in no_store(300)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_only_the_process_that_was_meant_is_killed(sleeper: subprocess.Popen[bytes]) -> None:
    this = Process.this()
    assert (this.pid, this.created) == (os.getpid(), psutil.Process().create_time())
    created = psutil.Process(sleeper.pid).create_time()
    assert not this.kill_beside(Process("elsewhere/1", sleeper.pid, created))
    assert not this.kill_beside(Process(this.space, sleeper.pid, created - 1))
    assert sleeper.poll() is None
    assert this.kill_beside(Process(this.space, sleeper.pid, created))
    assert sleeper.wait(10) == -signal.SIGKILL
    assert not this.kill_beside(Process(this.space, sleeper.pid, created))


@pytest.mark.timeout(500)
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_rank_that_stops_responding(
    frozen: int, recipe: Path, tmp_path: Path, start: Start
) -> None:
    """Rank 0 also keeps the store, so that then nobody can ask anybody."""
    run_dir = tmp_path / "run"
    process = start(train(recipe, run_dir, *SETTINGS))
    wait_until((run_dir / "checkpoints" / "latest").exists, what="first checkpoint")
    ranks_of(run_dir)[frozen].suspend()
    stopped_at = time.monotonic()
    code, output = finish(process, timeout=120)
    assert code == 1, output
    assert time.monotonic() - stopped_at < TIMEOUT_S + 60
    other = 1 - frozen
    assert f"rank {other} has been at step" in output
    # Which exchange of the loop it waits in is chance: a step's, an evaluation's or a save's.
    waits = re.search(r'launcher/run/loop\.py", line \d+, in train\n', output)
    assert waits, f"the stack of the one that waits:\n{output}"
    assert output.count(f"rank {frozen}") >= 1 and "did not answer" in output
    assert f"rank {other} has killed rank {frozen}" in output
    wait_until(lambda: not processes_of(run_dir), 30, "a process was left")
    if frozen == 1:
        assert "rank 1 was last heard of at step" in output
        code, output = finish(start(train(recipe, run_dir, "optim.epochs=20")))
        assert code == 0 and "continues at step" in output, output


def test_data_that_do_not_come(recipe: Path, tmp_path: Path, start: Start) -> None:
    run_dir = tmp_path / "run"
    process = start(train(recipe, run_dir, *SETTINGS, "data.workers=1", "optim.epochs=2000"))
    wait_until((run_dir / "checkpoints" / "latest").exists, what="first checkpoint")
    # The workers are children of the server that forks them.
    for server in ranks_of(run_dir)[1].children():
        for worker in server.children():
            worker.suspend()
    code, output = finish(process, timeout=120)
    assert code == 1, output
    # Epochs are short here: the data that do not come may be those of an evaluation.
    behind = re.search(r"rank 1 is behind, at step .*(waiting for data|evaluating); others", output)
    assert behind, output
    assert "rank 0 has been at step" in output and "rank 1 has been at step" in output
    wait_until(lambda: not processes_of(run_dir), 30, "a process was left")


# A loop of one rank that does nothing for so many seconds, after a first update.
IDLE = """
import sys, time, torch
from datetime import timedelta
from launcher.cluster import rendezvous
from launcher.cluster.world import find_world
from launcher.cluster.watchdog import Watchdog
world = find_world()
rendezvous.join(world, "gloo", torch.device("cpu"), timedelta(seconds=30))
watchdog = Watchdog(world, 2)
for step in (1, 2):
    watchdog.beat("agreeing whether to stop", step)
print("idle", flush=True)
time.sleep(float(sys.argv[1]))
watchdog.beat("going on")
watchdog.close()
"""


def test_suspended_time_does_not_count(start: Start) -> None:
    process = start([sys.executable, "-c", IDLE, "1"])
    assert process.stdout is not None
    assert process.stdout.readline() == "idle\n"
    psutil.Process(process.pid).suspend()
    time.sleep(6)
    psutil.Process(process.pid).resume()
    code, output = finish(process)
    assert code == 0, output


def test_one_rank_that_hangs(start: Start) -> None:
    code, output = finish(start([sys.executable, "-c", IDLE, "1000"]))
    assert code == 1
    assert 'File "<string>", line 13, in <module>' in output
    assert "every rank is at step 2, agreeing whether to stop" in output


def ranks_of(run_dir: Path) -> list[psutil.Process]:
    """The two ranks of a run of `scl train`, in order."""
    found = {process.name(): process for process in processes_of(run_dir)}
    return [found["scl-rank-0"], found["scl-rank-1"]]
