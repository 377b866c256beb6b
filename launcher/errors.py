"""Exceptions whose message is for the user, each with the exit code that it ends a program with."""

from __future__ import annotations

from data.errors import UserError

__all__ = ["RunError", "UsageError", "UserError"]


class UsageError(UserError):
    """Something the user asked for cannot be done: one sentence of what, where, and how to mend it.

    Raised before any process is spawned or file touched.
    """


class RunError(UserError):
    """A run that started cannot go on; the message says why and what is kept."""

    exit_code = 1
