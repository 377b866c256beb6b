from __future__ import annotations

import os
import queue
import signal
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import pytest

import data.processes
from data.errors import DataError
from data.processes import unordered


def _double_or_die(n: int) -> int:
    if n < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * n


@pytest.mark.parametrize("workers", [1, 3])
def test_each_task_is_done_once(workers: int) -> None:
    assert sorted(unordered(_double_or_die, range(20), workers)) == [*range(0, 40, 2)]


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(DataError, match="a packing process died"):
        list(unordered(_double_or_die, [*range(20), -1], 2))


def test_a_death_that_the_pool_does_not_notice_is_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.processes, "_LOOKS_EVERY_S", 0.05)
    process = get_context("spawn").Process(target=os._exit, args=(1,))
    process.start()
    done: queue.SimpleQueue[Future[int]] = queue.SimpleQueue()
    with pytest.raises(BrokenProcessPool):
        data.processes._next(done, [process])
