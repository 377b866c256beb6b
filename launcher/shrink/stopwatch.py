"""Milliseconds on this machine, as multiples of what the network took before it was cut."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from launcher.bench.timing import latencies

_CPU = torch.device("cpu")
_AT_A_TIME = 6


class Stopwatch:
    """Times calls on the CPU beside the network `model`, so that a machine's drift cancels.

    With one thread it is the processor's time that counts: what the call takes where nothing else
    runs, whatever else runs now. With several it is the clock on the wall. `today` is what `model`
    takes for `images`, in milliseconds; given, it is not measured again.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        threads: int = 1,
        rounds: int = 20,
        today: float | None = None,
    ) -> None:
        self._threads, self._rounds = threads, rounds
        self.clock = time.thread_time if threads == 1 else time.perf_counter
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
        self._reference = lambda: frozen(images)
        if today is None:
            with self._threaded():
                timed = latencies({0: self._reference}, 2 * rounds, _CPU, self.clock)
            today = timed[0].median
        self.today = today

    def __call__(self, calls: Mapping[Any, Callable[[], object]]) -> dict[Any, float]:
        """Milliseconds of each call: the median of its ratios to the network's, times `today`."""
        found: dict[Any, float] = {}
        names = list(calls)
        with self._threaded():
            for start in range(0, len(names), _AT_A_TIME):
                # The network first: ratios are to the first call of a round.
                some = {i: calls[n] for i, n in enumerate(names[start : start + _AT_A_TIME], 1)}
                timed = latencies({0: self._reference, **some}, self._rounds, _CPU, self.clock)
                found |= {names[start + i - 1]: timed[i].ratio * self.today for i in some}
        return found

    def on_the_wall(self, call: Callable[[], object]) -> tuple[float, float]:
        """Milliseconds by the clock on the wall: of the network before, and of `call`."""
        with self._threaded():
            timed = latencies({0: self._reference, 1: call}, 2 * self._rounds, _CPU)
        return timed[0].median, timed[1].median

    @contextmanager
    def _threaded(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(before)
