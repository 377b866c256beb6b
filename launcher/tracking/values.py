"""What a metric may be, and how it is written down."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Histogram:
    """How many values lie between neighbouring edges; `edges` has one number more than `counts`.

    `metrics.jsonl` gets the counts, W&B a histogram.
    """

    counts: tuple[int, ...]
    edges: tuple[float, ...]


def number(value: Any) -> Any:
    """A Python number for whatever counts as one (NumPy's, a tensor of one element)."""
    if value is None or isinstance(value, bool | int | str):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)


def json_of(value: Any) -> Any:
    """`value` in terms of what JSON has."""
    if isinstance(value, Histogram):
        return list(value.counts)
    if isinstance(value, Mapping):
        return {str(key): json_of(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_of(item) for item in value]
    plain = number(value)
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain
