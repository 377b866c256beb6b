"""The same work on many tasks, in this process or shared out among several."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from data.errors import DataError

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
    try:
        for future in as_completed([pool.submit(_do, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a packing process died (killed, or out of memory?); "
            "start the same packing again with fewer workers, it goes on where it was"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


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
