"""What is said to the person at the terminal; results go to stdout, everything else to stderr."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """One line to stderr, at once: it must be there when the process is killed next."""
    print(text, file=sys.stderr, flush=True)
