"""Ends a run that no longer gets anywhere, and says where every rank stood.

Two daemon threads a rank. One measures how long the loop has not gone on, and depends on nothing
but its own process. The other tells the store of the rendezvous where the rank is, over a
connection of its own: that may hang, as it does when rank 0, which keeps the store, is frozen.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch.distributed as dist

from launcher.cluster.positions import Exchange, Position, Process
from launcher.cluster.world import World
from launcher.terminal import say

# Before the second update come compilation, tuning of kernels and the start of data workers.
_START_UP_S = 120.0
# How long ranks may take to notice that one has given up, and to answer.
_ANSWER_WITHIN_S = 6.0
_LATER_S = 2.0
_HINT = "the same command continues from the last checkpoint"

T = TypeVar("T")


class Watchdog:
    """Watches the loop of this rank; a `beat` costs an assignment.

    After `timeout_s` seconds without a beat on any one rank, all ranks print where they are, the
    first that answers says who is silent or behind, and all end with exit code 1, those frozen on
    the same machine too. Time in which the process was suspended does not count. A `timeout_s` of
    0 watches nothing.
    """

    def __init__(self, world: World, timeout_s: float) -> None:
        """Collective."""
        self._world = world
        self._timeout_s = timeout_s
        self._position = Position(beats=0, step=0, doing="starting")
        self._first_update_is_behind = False
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        if not timeout_s:
            return
        self._processes: list[Process] = [Process.this()] * world.world_size
        dist.all_gather_object(self._processes, Process.this())
        self._tick_s = min(2.0, timeout_s / 5)
        self._exchange = Exchange(world, lambda: self._position, self._tick_s)
        for name, target in (("watchdog", self._watch), ("positions", self._exchange.run)):
            self._threads.append(threading.Thread(target=target, name=name, daemon=True))
            self._threads[-1].start()

    def beat(self, doing: str, step: int | None = None) -> None:
        """The loop goes on: it begins with `doing`, at `step` if that is another than before."""
        last = self._position
        if step is not None and last.step not in (0, step):
            self._first_update_is_behind = True
        self._position = Position(last.beats + 1, last.step if step is None else step, doing)

    def awaited(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, with a beat before and after each wait for the next."""
        iterator = iter(items)
        while True:
            self.beat("waiting for data")
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.beat("forward, backward or update")
            yield item

    def close(self) -> None:
        """Watch no longer; the store of the rendezvous may go then."""
        if self._closed.is_set() or not self._threads:
            return
        self._closed.set()
        self._exchange.close()
        faulthandler.cancel_dump_traceback_later()
        for thread in self._threads:
            thread.join(timeout=self._tick_s)

    def _watch(self) -> None:
        waited, last, before = 0.0, self._position.beats, time.monotonic()
        while not self._closed.wait(self._tick_s / 2):
            now = time.monotonic()
            # A gap of more than a tick is a process that was suspended: it could not go on.
            waited += min(now - before, self._tick_s)
            before = now
            if self._position.beats != last:
                waited, last = 0.0, self._position.beats
            limit = self._timeout_s
            if not self._first_update_is_behind:
                limit = max(limit, _START_UP_S)
            # A call that hangs and holds the interpreter stops this thread, but not faulthandler's.
            faulthandler.dump_traceback_later(limit + _ANSWER_WITHIN_S, file=2)
            if waited > limit or self._exchange.given_up.is_set():
                self._end(waited)

    def _end(self, waited: float) -> None:
        rank, size = self._world.rank, self._world.world_size
        say(f"rank {rank} has been at {self._position} for {waited:.0f} s:\n{stacks()}")
        answers = self._exchange.collect(_ANSWER_WITHIN_S)
        if self._closed.is_set():
            return
        faulthandler.cancel_dump_traceback_later()
        if answers is None:
            silent = [0] if rank else []
            say(f"error: rank {rank}: {no_store(self._timeout_s)}; {_HINT}")
        else:
            silent = [other for other in range(size) if other not in answers.here]
            if rank == min(answers.here):
                say(f"error: {verdict(answers.here, answers.before, self._timeout_s)}; {_HINT}")
        for other in silent:
            # Launchers ask a process to end, and wait long for one that is stopped.
            if self._processes[rank].kill_beside(self._processes[other]):
                say(f"rank {rank} has killed rank {other}")
        for worker in multiprocessing.active_children():
            worker.kill()
        if answers is not None and rank != min(answers.here):
            # Once a rank has ended, the launcher ends all: the verdict must be said before.
            time.sleep(_LATER_S)
        os._exit(1)


def verdict(here: Mapping[int, Position], silent: Mapping[int, Position], timeout_s: float) -> str:
    """The first cause in a sentence: `here` are the ranks that answer, `silent` the others."""
    stopped = f"nothing went on for {timeout_s:g} s"
    if silent:
        known = "; ".join(f"rank {r} was last heard of at {p}" for r, p in _first(silent))
        return (
            f"{stopped}: {_ranks(silent)} did not answer, so the process or its node is stopped, "
            f"hanging or gone ({known})"
        )
    last = min(position.beats for position in here.values())
    behind = {rank: p for rank, p in here.items() if p.beats == last}
    position = next(iter(behind.values()))
    if len(behind) == len(here):
        return f"{stopped}: every rank is at {position}; their stacks are above"
    others = next(p for p in here.values() if p.beats != last)
    return (
        f"{stopped}: {_ranks(behind)} is behind, at {position}; others wait at {others}; the stack "
        f"of rank {min(behind)} is above"
    )


def no_store(timeout_s: float) -> str:
    """What a rank says that cannot ask the others."""
    return (
        f"nothing went on for {timeout_s:g} s, and rank 0, which keeps the store of the "
        "rendezvous, did not answer, so its process or its node is stopped, hanging or gone"
    )


def stacks() -> str:
    """Where the main thread of this process is, and in one line each the other threads."""
    frames = sys._current_frames()
    main = threading.main_thread()
    lines = ["".join(traceback.format_stack(frames[main.ident])).rstrip()] if main.ident else []
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        if thread is main or thread is threading.current_thread() or frame is None:
            continue
        at = traceback.extract_stack(frame)[-1]
        lines.append(f"  thread {thread.name}: {at.filename}, line {at.lineno}, in {at.name}")
    return "\n".join(lines)


def _ranks(ranks: Mapping[int, Position]) -> str:
    shown = ", ".join(str(rank) for rank, _ in _first(ranks))
    more = len(ranks) - len(_first(ranks))
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}" + (f" and {more} more" if more else "")


def _first(ranks: Mapping[int, Position]) -> list[tuple[int, Position]]:
    return sorted(ranks.items())[:8]
