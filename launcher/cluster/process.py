"""What the kernel is told of a process: its name, and that it goes when its parent does."""

from __future__ import annotations

import ctypes
import os
import signal

_SET_PARENT_DEATH_SIGNAL, _SET_NAME = 1, 15


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
