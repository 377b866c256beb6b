"""Parts as forked processes: torch and timm are imported once, and each part can be ended alone."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

_LOOK_EVERY_S = 0.05


def import_first(modules: Iterable[str]) -> None:
    """Import what the parts will; one that cannot be is told of where it is run."""
    for module in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(f"benchmarks.gpu.{module}")


def forked(call: Callable[[], object], log: Path, seconds: float) -> int | None:
    """Exit code of a process that makes `call`, printing to `log`; None where it was out of time.

    It and all that it has started are gone afterwards.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _run(call, log)
    end = time.monotonic() + seconds
    code: int | None = None
    try:
        while code is None and time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                break
            time.sleep(_LOOK_EVERY_S)
    finally:
        # The group outlives its first process.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        if code is None:
            os.waitpid(pid, 0)
    return code


def _run(call: Callable[[], object], log: Path) -> None:
    """In the child; does not return."""
    code = 1
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
        call()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
