"""Ranks as processes: how they end, together, whoever ends first."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from launcher.cluster.process import stops
from launcher.run import spawn
from launcher.run.spawn import Ranks


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn, "_OTHERS_END_WITHIN_S", 0.5)


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """SIGHUP as in a terminal, also where these tests are run under nohup."""
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, former)


def run(body: Callable[[int], int], size: int = 2) -> int:
    before = psutil.Process().children()
    code = Ranks(body, size).wait()
    assert new_children(before) == []
    return code


def new_children(before: list[psutil.Process]) -> list[psutil.Process]:
    """Those of this process that are not among `before`: other tests have some too."""
    return [child for child in psutil.Process().children() if child not in before]


def wait_for(path: Path) -> None:
    for _ in range(500):
        if path.exists():
            return
        time.sleep(0.02)
    raise TimeoutError(path)


def forever(rank: int) -> int:
    time.sleep(60)
    return 0


def test_all_done_is_0() -> None:
    assert run(lambda rank: 0, 3) == 0


def test_ranks_are_named_in_one_word(tmp_path: Path) -> None:
    def body(rank: int) -> int:
        (tmp_path / str(rank)).write_text(Path("/proc/self/stat").read_text())
        return 0

    assert run(body) == 0
    names = [(tmp_path / str(rank)).read_text().split()[1] for rank in (0, 1)]
    assert names == ["(scl-rank-0)", "(scl-rank-1)"]


def test_the_first_that_fails_gives_the_code_and_no_other_is_left() -> None:
    assert run(lambda rank: 2 if rank else forever(rank)) == 2


def test_a_rank_that_does_not_listen_is_killed() -> None:
    def body(rank: int) -> int:
        if rank:
            return 1
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return forever(rank)

    assert run(body) == 1


def test_a_rank_that_was_killed_is_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    def body(rank: int) -> int:
        if rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return forever(rank)

    assert run(body) == 1
    assert "a rank was killed by SIGKILL" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_signal_before_there_is_anything_to_save(
    number: signal.Signals, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def body(rank: int) -> int:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        (tmp_path / str(rank)).touch()
        if rank == 0:
            wait_for(tmp_path / "1")
            os.kill(os.getppid(), number)
        return forever(rank)

    assert run(body) == 128 + number
    assert f"stopped by {number.name} before" in capfd.readouterr().err


def test_a_stop_that_the_ranks_have_saved_gives_their_code(tmp_path: Path) -> None:
    def body(rank: int) -> int:
        stopped: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
        (tmp_path / str(rank)).touch()
        if rank == 0:
            wait_for(tmp_path / "1")
            os.kill(os.getppid(), signal.SIGTERM)
        while not stopped:
            time.sleep(0.01)
        return 128 + stopped[0]

    assert run(body) == 143


def test_a_second_interrupt_kills(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def body(rank: int) -> int:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        (tmp_path / str(rank)).touch()
        if rank == 0:
            wait_for(tmp_path / "1")
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(0.3)
            os.kill(os.getppid(), signal.SIGINT)
        return forever(rank)

    assert run(body) == 130
    assert "killed by a second SIGINT" in capfd.readouterr().err


def test_what_a_rank_raises_stays_in_it(capfd: pytest.CaptureFixture[str]) -> None:
    def body(rank: int) -> int:
        raise SystemExit(0)

    assert run(body) == 1
    assert "SystemExit" in capfd.readouterr().err


def test_what_a_rank_has_started_may_end_by_itself(tmp_path: Path) -> None:
    def body(rank: int) -> int:
        # As W&B's service does, which writes the last lines when its client is gone.
        subprocess.Popen(["sh", "-c", f"sleep 0.5; echo written > {tmp_path}/{rank}"])
        return 0

    assert run(body) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["written\n"] * 2


def test_without_another_process_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    fork, forked, before = os.fork, [], psutil.Process().children()

    def failing() -> int:
        if forked:
            raise BlockingIOError("no more processes")
        forked.append(fork())
        return forked[0]

    monkeypatch.setattr(os, "fork", failing)
    with pytest.raises(BlockingIOError):
        Ranks(forever, 2)
    assert new_children(before) == []


def test_under_nohup_a_lost_terminal_changes_nothing(tmp_path: Path) -> None:
    def body(rank: int) -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getppid(), signal.SIGHUP)
        return 0

    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(body) == 0
    finally:
        signal.signal(signal.SIGHUP, former)


def test_what_handled_signals_before_does_so_after() -> None:
    before = [signal.getsignal(number) for number in stops()]
    assert run(lambda rank: 0) == 0
    assert [signal.getsignal(number) for number in stops()] == before
