"""What cannot be printed never ends a program."""

from __future__ import annotations

import subprocess
import sys

from tests.launcher.conftest import ROOT, environment

_PROGRAM = """
import sys
from launcher.terminal import forgive, say
forgive()
sys.stdin.read()
print("λ", flush=True)
say("λ")
print("to the end", file=sys.stderr)
"""


def started(*, closed: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, _PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(PYTHONIOENCODING="ascii"),
    )


def test_a_character_that_the_log_lacks_is_escaped() -> None:
    process = started()
    assert process.communicate() == ("\\u03bb\n", "\\u03bb\nto the end\n")
    assert process.returncode == 0


def test_a_reader_that_is_gone_is_no_error() -> None:
    process = started()
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    process.stdin.close()
    assert "to the end" in process.stderr.read()
    assert process.wait() == 0
    process.stderr.close()


def test_closed_streams_are_no_error() -> None:
    process = started(closed=">&- 2>&-")
    process.communicate()
    assert process.returncode == 0
