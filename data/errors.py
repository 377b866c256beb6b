"""The one exception that reaches users of the data room."""


class DataError(Exception):
    """What is wrong, where, and how to fix it, in one sentence."""
