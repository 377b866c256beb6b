"""Processes of this machine: forked, named, what stops them, and gone when their parent is."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import util
from typing import NoReturn

from launcher.errors import UserError
from launcher.terminal import say

_STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

_SET_PARENT_DEATH_SIGNAL, _SET_NAME = 1, 15


def stops() -> list[signal.Signals]:
    """The signals that save a run and stop it.

    SIGHUP is one, which comes when the terminal or its connection is gone, unless nohup has seen to
    it that it is ignored.
    """
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in _STOPS if not (nohup and number == signal.SIGHUP)]


def fork(body: Callable[[], int]) -> int:
    """Start a process that begins as a copy of this one and ends with the exit code of `body`.

    Returns its process id. The signals of `stops` are neither blocked nor heard in it at first.
    """
    _flush()
    stopping = stops()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        # As in a process of multiprocessing's: what is done at its end is what it asks for itself.
        atexit._clear()
        atexit.register(util._exit_function)  # type: ignore[attr-defined]
        for number in stopping:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping)
        code = body()
    except UserError as error:
        say(f"error: {error}")
        code = error.exit_code
    except BaseException:
        say(f"error: this process failed:\n{traceback.format_exc()}")
    finally:
        # Nothing that happens in it goes up to what its parent was doing, which is its stack too.
        end_process(code)


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
    _flush()
    os._exit(code)


@contextlib.contextmanager
def ends_after(seconds: float, sentence: str) -> Iterator[None]:
    """Whatever hangs inside, a network or a driver, the process says so and ends with code 1."""

    def end() -> None:
        say(f"error: {sentence}")
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def name_rank(rank: int) -> None:
    """Let `ps` and `top` show this process as `scl-rank-N`, where the system can."""
    # Without blanks: Slurm's proctrack/linuxproc reads /proc/PID/stat as words, and loses a process
    # whose name is two, and with it the signals that were meant for the rank.
    _prctl(_SET_NAME, f"scl-rank-{rank}".encode())


def end_with_parent(parent: int) -> None:
    """Get SIGTERM when `parent`, which has started this process, is gone: so that none is left.

    Ends this process at once if `parent` is gone already. Linux only; elsewhere a rank finds out
    between two updates.
    """
    _prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        # Closed, or its reader is gone: what cannot be printed never ends a run.
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _prctl(option: int, value: int | bytes) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(option, value, 0, 0, 0)
