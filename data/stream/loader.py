"""Torch's DataLoader, made safe: workers that survive the rank's signals and never die silently."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader, Dataset

from data.errors import DataError

# Torch notices a dead worker only when a wait ends, so waits are short and repeated.
POLL_SECONDS = 2
STUCK_SECONDS = 120
# By the server of workers; multiprocessing says nothing of a name that it cannot import.
PRELOADED = (f"{__package__}.preloaded",)
_RANKS_SIGNALS = {
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
}


class _Keys:
    """A batch sampler around one iterator of keys."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


def load(
    dataset: Dataset[Any],
    batches: Iterable[Any],
    *,
    workers: int,
    prefetch: int,
    modules: Sequence[str] = (),
    stuck_seconds: float = STUCK_SECONDS,
) -> Iterator[Any]:
    """Yield the collated items of each list of keys, in order, whatever the number of workers.

    At most `workers × prefetch` batches are ahead. `modules` are what the dataset will import
    beyond what all do: where these are the first workers of this process, it happens once for all
    of them. The global random state is not touched. Raises DataError if a worker died or nothing
    came for `stuck_seconds`, and whatever the dataset raised.
    """
    options: dict[str, Any] = {}
    if workers:
        # Forked workers would inherit the locks of gloo's and NCCL's threads, held or not;
        # spawned ones import torch once each, those of a fork server once in all.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED, *modules])
        _start_forkserver()
        options = {
            "multiprocessing_context": context,
            "prefetch_factor": prefetch,
            "timeout": POLL_SECONDS,
            "worker_init_fn": functools.partial(_end_with, os.getpid()),
        }
    loader = DataLoader(
        dataset,
        batch_sampler=_Keys(batches),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # Without its own generator a loader draws its base seed from the global one.
        generator=torch.Generator(),
        # A data set that is asked for whole batches has put them together itself.
        collate_fn=_as_it_is if hasattr(dataset, "__getitems__") else None,
        **options,
    )
    if not workers:
        yield from loader
        return
    yield from _watched(loader, stuck_seconds)


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_forkserver() -> None:
    """Start the server with the signals meant for the rank blocked; its workers inherit that.

    Slurm sends a job's signals to every process of a rank. The rank answers with a checkpoint,
    for which it needs its workers alive.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _RANKS_SIGNALS)
    try:
        # Starting the tracker unblocks SIGINT and SIGTERM: it comes first, then they are set again.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _RANKS_SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with(rank: int, _worker: int) -> None:
    """In a worker: leave when the process `rank` is gone, however it went.

    Torch's own watch asks for the parent, and a worker's parent is the fork server, which in turn
    lives as long as its workers.
    """

    def watch() -> None:
        while _is_alive(rank):
            time.sleep(POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _is_alive(pid: int) -> bool:
    """Whether `pid` still runs; a killed process keeps its number until its parent asks."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _watched(loader: DataLoader[Any], stuck_seconds: float) -> Iterator[Any]:
    others = set(multiprocessing.active_children())
    iterator = iter(loader)
    workers = [p for p in multiprocessing.active_children() if p not in others]

    def end_workers() -> None:
        for worker in workers:
            if worker.is_alive():
                worker.kill()

    # An exception that nobody catches leaves this generator as it is, and multiprocessing would
    # wait at exit for workers to which SIGTERM says nothing.
    atexit.register(end_workers)
    try:
        while (batch := _next(iterator, workers, stuck_seconds)) is not None:
            yield batch
    finally:
        # Torch ends its workers itself, but those that hang would hang the interpreter's exit.
        del iterator
        end_workers()
        atexit.unregister(end_workers)


def _next(iterator: Iterator[Any], workers: list[BaseProcess], stuck_seconds: float) -> Any:
    started = time.monotonic()
    while True:
        try:
            return next(iterator, None)
        except DataError as error:
            # Torch puts the worker's traceback around the one sentence that was meant.
            raise DataError(str(error).strip().splitlines()[-1].partition(": ")[2]) from error
        except RuntimeError as error:
            _raise_if_dead(workers, error)
            if "timed out" not in str(error):
                raise
            if time.monotonic() - started > stuck_seconds:
                raise DataError(
                    f"no batch came from {len(workers)} data workers for {stuck_seconds:.0f} s; "
                    "check that the file system of the shards answers"
                ) from error


def _raise_if_dead(workers: list[BaseProcess], cause: Exception) -> None:
    dead = [worker for worker in workers if not worker.is_alive()]
    if dead:
        raise DataError(
            f"data worker {dead[0].pid} died (exit code {dead[0].exitcode}; -9 is often a lack of "
            "memory, -7 a full /dev/shm); give the job more memory or lower data.workers"
        ) from cause
