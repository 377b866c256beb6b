"""What is said to the user: the one kind of exception whose message is meant to be read."""

from __future__ import annotations


class UserError(Exception):
    """The message is for the user: one sentence of what is wrong, where, and how to mend it.

    A program that lets one through prints the message without a traceback and ends with
    `exit_code`.
    """

    exit_code: int = 2


class DataError(UserError):
    """Something about the data, or what was asked of it, is not as it must be."""
