"""What the benchmarks share: options, timing in turn, the machine, tables and the last line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Round = dict[str, float]


def options_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark has; `doc` is its module's docstring."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs")
    return parser


def parse(parser: argparse.ArgumentParser, *, devices: int = 1) -> argparse.Namespace:
    """The options; ends the program with one sentence where the machine lacks what they ask for."""
    options = parser.parse_args()
    if options.device == "cuda" and torch.cuda.device_count() < devices:
        parser.error(f"needs {devices} GPU(s); this machine has {torch.cuda.device_count()}")
    # The launcher takes GPUs where there are any; this also reaches the ranks started from here.
    os.environ["DS_ACCELERATOR"] = options.device
    return options


def seconds(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    *,
    before: Callable[[], object] | None = None,
) -> list[Round]:
    """Seconds of each call in each round; `before` runs ahead of every call and is not timed.

    A machine whose speed drifts treats all calls of a round alike; every other round goes
    backwards, so that none profits from what its predecessor leaves in the caches.
    """
    names, timed = list(calls), []
    for number in range(rounds):
        taken = {}
        for name in reversed(names) if number % 2 else names:
            if before is not None:
                before()
            taken[name] = seconds(calls[name], device)
        timed.append(taken)
    return timed


def median(rounds: Sequence[Round], name: str) -> float:
    return statistics.median(r[name] for r in rounds)


def median_ratio(rounds: Sequence[Round], name: str, base: str) -> float:
    """The median of the ratios, in which the drift between rounds cancels."""
    return statistics.median(r[name] / r[base] for r in rounds)


def machine(device: torch.device) -> str:
    name = f"{platform.machine()} CPU"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def report(
    benchmark: str,
    *,
    ratio: float,
    target: float,
    device: torch.device,
    details: Mapping[str, Any],
    also: Mapping[str, Any] | None = None,
) -> None:
    """The last line: one JSON object; `also` goes beside what all benchmarks say."""
    print(
        json.dumps(
            {
                "benchmark": benchmark,
                "ratio": round(ratio, 6),
                "target": target,
                **(also or {}),
                "machine": machine(device),
                "details": details,
            }
        ),
        flush=True,
    )
