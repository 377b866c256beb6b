"""Exceptions whose message is for the user, each with the exit code that it ends a program with."""

from __future__ import annotations

import errno
import sys

try:
    from data.errors import UserError
except ImportError as error:
    other = sys.modules.get("data")
    if other is None:
        raise
    place = other.__file__ or next(iter(other.__path__))
    raise ImportError(
        f"'data' is {place} here, which comes before SCL's package of that name: take it off the "
        "path (PYTHONPATH, the folder Python is started in), or install SCL from a wheel, not as "
        "editable: it has no package of such a name then"
    ) from error

__all__ = ["RunError", "UsageError", "UserError", "disk_refusal"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_IN_THE_WAY = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


class UsageError(UserError):
    """Something the user asked for cannot be done: one sentence of what, where, and how to mend it.

    Raised before any process is spawned or file touched.
    """


class RunError(UserError):
    """A run that started cannot go on; the message says why and what is kept."""

    exit_code = 1


def disk_refusal(error: OSError) -> UserError | None:
    """What a file system that refuses is to the user; None where `error` is something else."""
    reason = (error.strerror or "").lower()
    where = f"{error.filename}: {reason}" if error.filename else f"a file system refuses: {reason}"
    if error.errno in _FULL:
        return RunError(f"{where}; make room there, or choose another place")
    if error.errno in _FORBIDDEN:
        return UsageError(f"{where}; choose a place that you may write to and read from")
    if error.errno in _IN_THE_WAY:
        return UsageError(f"{where}; something else is there already: choose another place")
    if error.errno == errno.EIO:
        return RunError(f"{where}; the disk or its server fails: the system's log may say why")
    return None
