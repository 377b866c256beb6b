"""Ports for processes that are told one, and bind it only later.

A port that the system has chosen and that was let go may be chosen again by anybody, at once. These
lie below those it chooses from, and a counter in a locked file gives each to one caller, whatever
process of whatever test run that is, until all have had their turn.
"""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from pathlib import Path

_FIRST, _LAST = 15_000, 31_000


def free_port() -> str:
    """A port of this machine that nothing listens at, and that nobody else is given."""
    path = Path(tempfile.gettempdir()) / f"scl-test-ports-{os.getuid()}"
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        last = int(file.read() or _FIRST)
        for step in range(1, _LAST - _FIRST):
            port = _FIRST + (last - _FIRST + step) % (_LAST - _FIRST)
            if _is_free(port):
                file.seek(0)
                file.truncate()
                file.write(str(port))
                return str(port)
    raise OSError(f"no port from {_FIRST} to {_LAST} is free")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
