"""How long the network of each run takes in the native runtime, on the machine that compares."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from launcher.bench.timing import latencies
from launcher.compare.entry import Entry
from launcher.errors import UserError
from launcher.export.source import open_source
from sclcore.export import ExportError
from sclcore.export.native import open_native

_ROUNDS = 15


def with_milliseconds(entries: Sequence[Entry]) -> list[Entry]:
    """`entries` with the latency of one image on one thread, as `scl export --format native` runs.

    All take turns in every round, and only their own work is timed. Where there is no latency, the
    entry says why: the runtime refuses the network, or the run is not on this machine.
    """
    calls: dict[str, Callable[[], Tensor]] = {}
    reasons: dict[str, str] = {}
    for entry in entries:
        try:
            calls[entry.place] = _call(entry)
        except (UserError, ExportError) as error:
            reasons[entry.place] = str(error).rstrip(".")
    times = latencies(calls, _ROUNDS, torch.device("cpu"), time.thread_time) if calls else {}
    return [
        replace(
            entry,
            milliseconds=times[entry.place].median if entry.place in times else None,
            unmeasured=reasons.get(entry.place, ""),
        )
        for entry in entries
    ]


def _call(entry: Entry) -> Callable[[], Tensor]:
    source = open_source(Path(entry.place))
    with tempfile.TemporaryDirectory() as folder:
        run = open_native(source.model.float(), Path(folder), source.network.example(2))
    images = source.network.example(1)
    return partial(run, torch.randn(images.shape, generator=torch.Generator().manual_seed(0)))
