"""The one exception whose message is for the user."""

from __future__ import annotations


class UsageError(Exception):
    """Something the user asked for cannot be done: one sentence of what, where, and how to mend it.

    Ends the program with exit code 2, before any process is spawned or file touched.
    """


class RunError(Exception):
    """A run that started cannot go on; the message says why and what is kept. Exit code 1."""
