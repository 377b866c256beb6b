"""Processes of this machine: forked, named, and gone when their parent is."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from launcher.errors import UserError
from launcher.terminal import say

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What asks a run to save and stop."""

_SET_PARENT_DEATH_SIGNAL, _SET_NAME = 1, 15


def fork(body: Callable[[], int]) -> int:
    """Start a process that begins as a copy of this one and ends with the exit code of `body`.

    Returns its process id. Signals do to it what they do to any program that does not listen.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        code = body()
    except UserError as error:
        say(f"error: {error}")
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        # Not up into the stack of the parent, which is there as well.
        end_process(code)


def end_process(code: int) -> NoReturn:
    """End this process, all of whose work is done, at once.

    The interpreter's own exit takes apart every module, and waits for threads of collectives that
    will never complete after a failure, and for W&B's service, which a signal to all processes of
    a rank has ended already.
    """
    if code == 0:
        # All is written: a signal from here on must not make a failure of it.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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


def _prctl(option: int, value: int | bytes) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(option, value, 0, 0, 0)
