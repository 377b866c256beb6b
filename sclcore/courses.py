"""Courses of a density or a share over the progress of a run."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence


def cubic_density(progress: float, *, final: float, begin: float, end: float) -> float:
    """1 − s(t), with s(t) = s_f − s_f · (1 − t)³ and t from 0 at `begin` to 1 at `end`.

    Source: Zhu and Gupta, arXiv 1710.01878, section 3.
    """
    if progress >= end:
        return final
    t = max(0.0, progress - begin) / (end - begin)
    return final + (1 - final) * (1 - t) ** 3


def check_course(begin: float, end: float) -> None:
    """Raises ValueError where a course would end before it begins."""
    if begin >= end:
        raise ValueError(f"begin must lie below end, which is {end}")


def half_cosine(progress: float, *, first: float, end: float) -> float:
    """From `first` at 0 to 0 at `end`."""
    return 0.5 * first * (1 + math.cos(math.pi * progress / end))


# A share of a run is a quotient of whole numbers, and may lie this much beside a sum of shares.
_ROUNDING = 1e-9


def reached(progress: float, place: float) -> bool:
    """Whether a run has come to `place`, rounding aside."""
    return progress >= place - _ROUNDING


def phase_at(progress: float, *, begin: float, length: float) -> int:
    """Which of the phases of one length a run is in, from 0 at `begin`; negative before it."""
    return math.floor((progress - begin) / length + _ROUNDING)


def again(progress: float, places: Sequence[float], first: float = 0.0) -> float:
    """Where a schedule is that begins again at each of `places`, of which the first is 0.

    It is gone through from 0 to 1 up to the second of them, and from `first` to 1 after each other.
    """
    index = bisect_right(places, progress + _ROUNDING) - 1
    begin, end = places[index], [*places, 1.0][index + 1]
    share = min(1.0, max(0.0, (progress - begin) / (end - begin)))
    return share if index == 0 else first + (1 - first) * share
