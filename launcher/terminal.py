"""What is said to the person at the terminal; results go to stdout, everything else to stderr.

What cannot be printed never ends a run: a character that the terminal's or the log's encoding lacks
becomes an escape, and nobody reading any more is no error.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

# Where these are set, output ends up in a log file, even if it looks like a terminal.
_BATCH_VARIABLES = ("SLURM_JOB_ID", "CI")
_CLEAR_LINE = "\r\x1b[K"


def say(text: str) -> None:
    """One line to stderr, at once: it must be there when the process is killed next.

    On a terminal it takes the place of a progress bar, whichever process has drawn that.
    """
    begin = "" if is_plain(sys.stderr) else _CLEAR_LINE
    print(f"{begin}{text}", file=sys.stderr, flush=True)


def is_plain(stream: TextIO) -> bool:
    """Whether `stream` shall get plain lines, without control characters."""
    if any(os.environ.get(name) for name in _BATCH_VARIABLES):
        return True
    return os.environ.get("TERM") == "dumb" or not stream.isatty()


def importing(what: str) -> Waiting:
    """While it is open, `what` is imported, as the first that a command does.

    It speaks sooner than others: nothing has been said yet.
    """
    return Waiting(f"importing {what}", first=1.0)


class Waiting:
    """While it is open, says now and then what is waited for, and for how long it has been.

    To stderr, after 5 s (or `first`, where that is sooner) and then ever more rarely; nothing if
    all is done before. It has a thread: to be closed before the process forks.
    """

    def __init__(self, doing: str, hint: str = "", first: float = 5.0) -> None:
        self._doing, self._hint, self._first = doing, hint, first
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="waiting", daemon=True)

    def __enter__(self) -> Waiting:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        pace = Pace(self._first)
        while not self._closed.wait(max(0.0, pace.next_at - pace.seconds)):
            if pace.is_due():
                say(f"{self._doing}: {pace.seconds:.0f} s so far{self._hint}")


class Pace:
    """When to say again that something still goes on: as `moments` has it."""

    def __init__(self, first: float = 5.0) -> None:
        self._began = time.monotonic()
        self._moments = moments(first)
        self.next_at = next(self._moments)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    def is_due(self) -> bool:
        """Whether to say so now; once for each moment."""
        if self.seconds < self.next_at:
            return False
        self.next_at = next(at for at in self._moments if at > self.seconds)
        return True


def moments(first: float = 5.0) -> Iterator[float]:
    """In seconds from the beginning: `first`, 5, 10 …; from the first minute on, once a minute."""
    yield first
    yield from (at for at in (5.0, 10.0, 20.0, 40.0) if at > first)
    for minute in itertools.count(1):
        yield 60.0 * minute


def forgive() -> None:
    """Let stdout and stderr take any text, read or not. For a program, when it begins."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # Closed by whoever started this process.
            stream = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
        # A notebook or a test puts other streams in their place, which are left alone.
        if type(stream) is io.TextIOWrapper:
            # A stream that was redirected after it was opened may wrongly believe that it can seek.
            with contextlib.suppress(OSError):
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Forgiving(stream))


class _Forgiving:
    """A stream whose writes are lost once its reader is gone."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
