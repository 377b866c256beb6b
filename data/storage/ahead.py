"""Having the shards ready before they are read: the next window while this one is used."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple, Protocol, TypeVar

_log = logging.getLogger("data")
_SAY_EVERY_S = 30
_Keys = TypeVar("_Keys")
_Batch = TypeVar("_Batch")


class Stretch(NamedTuple):
    """Bytes `first` to `end` (exclusive) of shard number `shard`: what is read of it at a time."""

    shard: int
    first: int
    end: int


class Prepare(Protocol):
    """Makes a stretch of a shard ready to be read."""

    def __call__(
        self, stretch: Stretch, urgent: Callable[[], bool], stopped: Callable[[], bool]
    ) -> Callable[[], None] | None:
        """Return what to call once the stretch is no longer needed; None only when `stopped`.

        `urgent` says whether somebody waits for it.
        """
        ...


class Ahead:
    """Threads that prepare shards stage by stage: the stage being read, and the one after it.

    A stage is what is read together: this rank's part of a window of the training order, a few
    shards in evaluation. Stages are numbered; `stretches(number)` lists those of one, in order.
    """

    def __init__(
        self,
        stretches: Callable[[int], list[Stretch]],
        end: int,
        prepare: Prepare,
        *,
        threads: int,
        wait: bool,
    ) -> None:
        """`end`: the number after the last stage. `wait`: read nothing that is not ready."""
        self._stretches = lru_cache(maxsize=2)(stretches)
        self._end = end
        self._prepare = prepare
        self._threads = threads
        self._wait = wait
        self._changed = threading.Condition()
        self._wanted: dict[Stretch, int] = {}  # the last stage that needs it
        self._queue: deque[Stretch] = deque()
        self._ready: dict[Stretch, Callable[[], None]] = {}
        self._urgent: set[Stretch] = set()
        self._planned = self._entered = -1
        self._unread: deque[range] = deque()
        self._error: Exception | None = None
        self._stopped = False

    def keys(self, keys: Iterable[_Keys], stages: Iterable[range]) -> Iterator[_Keys]:
        """Yield `keys`, each once the shards of its stages are ready; none after a failure."""
        # An exception here would pass through torch's loader, which is not built for that.
        for key, needed in zip(keys, stages, strict=True):
            for stage in needed:
                if stage > self._entered:
                    self._enter(stage)
            if self._wait and self._error is not None:
                return
            self._unread.append(needed)
            yield key

    def batches(self, batches: Iterator[_Batch]) -> Iterator[_Batch]:
        """Yield the batches made of `keys`, and let go of shards that no later one needs.

        Raises DataError where a shard could not be made ready.
        """
        try:
            for batch in batches:
                yield batch
                self._release_before(self._unread.popleft().start)
            if self._wait and self._error is not None:
                raise self._error
        finally:
            self.close()

    def close(self) -> None:
        """End the threads and let go of all shards; returns without waiting for the threads."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            for release in self._ready.values():
                release()
            self._ready.clear()

    def _enter(self, stage: int) -> None:
        with self._changed:
            self._entered = stage
            for number in range(max(stage, self._planned + 1), min(stage + 2, self._end)):
                self._plan(number)
            if self._wait:
                self._urgent = {s for s in self._stretches(stage) if s not in self._ready}
            self._changed.notify_all()
        while self._queue and self._threads > 0:
            self._threads -= 1
            threading.Thread(target=self._work, name="shards", daemon=True).start()
        if self._wait:
            self._wait_for_urgent()

    def _plan(self, stage: int) -> None:
        for stretch in self._stretches(stage):
            if stretch not in self._wanted:
                self._queue.append(stretch)
            self._wanted[stretch] = stage
        self._planned = stage

    def _wait_for_urgent(self) -> None:
        said = time.monotonic()
        with self._changed:
            while self._urgent and self._error is None:
                self._changed.wait(timeout=1)
                if time.monotonic() - said > _SAY_EVERY_S:
                    said = time.monotonic()
                    _log.warning("waiting for %d shards to be fetched", len(self._urgent))

    def _release_before(self, stage: int) -> None:
        with self._changed:
            for stretch in [s for s, last in self._wanted.items() if last < stage]:
                if stretch in self._ready:
                    self._ready.pop(stretch)()
                    del self._wanted[stretch]

    def _work(self) -> None:
        while (stretch := self._next()) is not None:
            try:
                release = self._prepare(
                    stretch, lambda wanted=stretch: wanted in self._urgent, lambda: self._stopped
                )
            except Exception as error:
                with self._changed:
                    self._error = self._error or error
                    self._changed.notify_all()
                return
            self._is_ready(stretch, release)

    def _next(self) -> Stretch | None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._queue)
            return None if self._stopped else self._queue.popleft()

    def _is_ready(self, stretch: Stretch, release: Callable[[], None] | None) -> None:
        with self._changed:
            if release is None:
                return
            if self._stopped:
                release()
                return
            self._ready[stretch] = release
            self._urgent.discard(stretch)
            self._changed.notify_all()
