"""`scl` with its moments on stderr, for benchmarks.startup: `python -m benchmarks.moments train …`.

A line a moment, `@moment NAME SECONDS` (Unix time), from the parent and from rank 0. Imports
nothing that the command would not.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

MARK = "@moment"
# (module, function, moment when it is called, moment when it returns)
WATCHED = (
    ("launcher.start.train", "prepare", "imported", "checked"),
    ("launcher.run.rank", "run_rank", "forked", None),
    ("launcher.run.rank", "build", "met", "built"),
    ("launcher.run.loop", "open_tracker", None, "tracker"),
    ("launcher.run.loop", "train_step", None, "update"),
    ("launcher.run.loop", "validate", None, "evaluated"),
    ("launcher.run.finish", "write_results", "saved", "results"),
)


def say(moment: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{MARK} {moment} {time.time():.4f}\n".encode())


def watch(module: str, name: str, before: str | None, after: str | None) -> None:
    """Say when the function `name` is called, and when it returns."""
    home = importlib.import_module(module)
    watched = getattr(home, name)

    @functools.wraps(watched)
    def call(*arguments: Any, **more: Any) -> Any:
        if before is not None:
            say(before)
        result = watched(*arguments, **more)
        if after is not None:
            say(after)
        return result

    setattr(home, name, call)


def first_batch(batches: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """`Inputs.batches`, which says when the first one is there."""

    @functools.wraps(batches)
    def call(*arguments: Any) -> Iterator[Any]:
        stream = batches(*arguments)
        first = next(stream)
        say("batch")
        yield first
        yield from stream

    return call


def main() -> int:
    say("python")
    from launcher.cli import main as scl

    for module, name, before, after in WATCHED:
        watch(module, name, before, after)
    from launcher.run import inputs, rank, spawn

    spawn.run_rank = rank.run_rank
    inputs.Inputs.batches = first_batch(inputs.Inputs.batches)  # type: ignore[method-assign]
    return scl()


if __name__ == "__main__":
    sys.exit(main())
