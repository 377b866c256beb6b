"""The same work on many tasks, in this process or shared out among several."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import queue
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from data.errors import DataError

# The pool itself notices within milliseconds that a process died; but for a moment while it starts.
_LOOKS_EVERY_S = 5.0

Task = TypeVar("Task")
Result = TypeVar("Result")


def unordered(
    work: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[Result]:
    """Yield `work(task)` of each task as they are done; with 1 worker, in this process.

    `work` is picklable and sent to each process once. Raises DataError where a process died, and
    whatever `work` raises; tasks not begun are then dropped.
    """
    if workers == 1 or len(tasks) <= 1:
        yield from map(work, tasks)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(work,),
    )
    processes, others = set(), set(multiprocessing.active_children())
    done: queue.SimpleQueue[Future[Result]] = queue.SimpleQueue()
    try:
        for task in tasks:
            pool.submit(_do, task).add_done_callback(done.put)
        processes = set(multiprocessing.active_children()) - others
        for _ in tasks:
            yield _next(done, processes).result()
    except BrokenProcessPool as error:
        for process in processes:
            process.kill()
        raise DataError(
            "a packing process died (killed, or out of memory?); "
            "start the same packing again with fewer workers, it goes on where it was"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _next(
    done: queue.SimpleQueue[Future[Result]],
    processes: Collection[multiprocessing.process.BaseProcess],
) -> Future[Result]:
    """The next that is done.

    Raises BrokenProcessPool where a process died and the pool has not noticed, or waits itself for
    another that waits for ever for a lock that the dead one held.
    """
    died = False
    while True:
        try:
            return done.get(timeout=_LOOKS_EVERY_S)
        except queue.Empty:
            if died:
                raise BrokenProcessPool from None
            died = any(process.exitcode is not None for process in processes)


_work: list[Callable[[Any], Any]] = []


def _start(work: Callable[[Any], Any]) -> None:
    _work[:] = [work]
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: multiprocessing.process.BaseProcess) -> None:
    # A killed parent leaves pool processes waiting for work for ever.
    parent.join()
    os._exit(1)


def _do(task: Any) -> Any:
    return _work[0](task)
