"""A process: what the kernel is told of it, what stops it, how it ends."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
from typing import NoReturn

_STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

_SET_PARENT_DEATH_SIGNAL, _SET_NAME = 1, 15


def stops() -> list[signal.Signals]:
    """The signals that save a run and stop it.

    SIGHUP is one, which comes when the terminal or its connection is gone, unless nohup has seen to
    it that it is ignored.
    """
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in _STOPS if not (nohup and number == signal.SIGHUP)]


def name_rank(rank: int) -> None:
    """Let `ps` and `top` show this process as `scl rank N`, where the system can."""
    _prctl(_SET_NAME, f"scl rank {rank}".encode())


def end_with_parent(parent: int) -> None:
    """Get SIGTERM when `parent`, which has started this process, is gone: so that none is left.

    Ends this process at once if `parent` is gone already. Linux only; elsewhere a rank finds out
    between two updates.
    """
    _prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def end_process(code: int) -> NoReturn:
    """End this process, all of whose work is done, at once.

    The interpreter's own exit takes apart every module, and waits for threads of collectives that
    will never complete after a failure, and for W&B's service, which a signal to all processes of
    a rank has ended already.
    """
    if code == 0:
        # All is written: a signal from here on must not make a failure of it.
        for number in stops():
            signal.signal(number, signal.SIG_IGN)
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        # Closed, or its reader is gone: what cannot be printed never ends a run.
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _prctl(option: int, value: int | bytes) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(option, value, 0, 0, 0)
