"""Timing several calls in turn, so that a machine whose speed drifts treats them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Call = Callable[[], object]
Clock = Callable[[], float]
Name = TypeVar("Name", bound=Hashable)
_LEAST_S = 0.005
"""One timing repeats a call at least so long, or the clock and the interpreter would be timed."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call, over all rounds; `ratio` is the median of its times over those of
    the first call in the same round, in which the drift between rounds cancels."""

    median: float
    p5: float
    p95: float
    ratio: float


def latencies(
    calls: Mapping[Name, Call],
    rounds: int,
    device: torch.device,
    clock: Clock = time.perf_counter,
) -> dict[Name, Latency]:
    """The latency of each of `calls`; every other round goes through them backwards.

    `clock` gives seconds. `time.thread_time` leaves out what other programs take of the processor;
    it sees the work of one thread, on the CPU.
    """
    repeats = {name: _repeats(call, device, clock) for name, call in calls.items()}
    times: dict[Name, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        for name in reversed(names) if number % 2 else names:
            times[name].append(_seconds(calls[name], repeats[name], device, clock))
    base = times[names[0]]
    return {name: _latency(seconds, base) for name, seconds in times.items()}


def _repeats(call: Call, device: torch.device, clock: Clock) -> int:
    """How often a call fits into a timing; the first calls warm up and do not count."""
    for _ in range(3):
        _seconds(call, 1, device, clock)
    return max(1, round(_LEAST_S / max(_seconds(call, 1, device, clock), 1e-6)))


def _seconds(call: Call, repeats: int, device: torch.device, clock: Clock) -> float:
    _synchronise(device)
    began = clock()
    for _ in range(repeats):
        call()
    _synchronise(device)
    return (clock() - began) / repeats


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _latency(times: Sequence[float], base: Sequence[float]) -> Latency:
    ranked = sorted(1000 * t for t in times)
    last = len(ranked) - 1
    return Latency(
        median=statistics.median(ranked),
        p5=ranked[round(0.05 * last)],
        p95=ranked[round(0.95 * last)],
        ratio=statistics.median(t / b for t, b in zip(times, base, strict=True)),
    )
