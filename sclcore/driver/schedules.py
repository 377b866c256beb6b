"""Courses of a density or a share over the progress of a run."""

from __future__ import annotations

import math


def cubic_density(progress: float, *, final: float, begin: float, end: float) -> float:
    """1 − s(t), with s(t) = s_f − s_f · (1 − t)³ and t from 0 at `begin` to 1 at `end`.

    Source: Zhu and Gupta, arXiv 1710.01878, section 3.
    """
    if progress >= end:
        return final
    t = max(0.0, progress - begin) / (end - begin)
    return final + (1 - final) * (1 - t) ** 3


def half_cosine(progress: float, *, first: float, end: float) -> float:
    """From `first` at 0 to 0 at `end`."""
    return 0.5 * first * (1 + math.cos(math.pi * progress / end))
