"""What cannot be printed never ends a program."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path

from tests import forkserver
from tests.launcher.conftest import ROOT, environment, train

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


def lines_of(output: str) -> list[str]:
    """What a terminal shows of `output`: a carriage return writes over, \\x1b[K clears the rest."""
    shown = []
    for raw in output.split("\n"):
        line, at = "", 0
        for part in re.split(r"(\r|\x1b\[K)", raw):
            if part == "\r":
                at = 0
            elif part == "\x1b[K":
                line = line[:at]
            else:
                line, at = line[:at].ljust(at) + part + line[at + len(part) :], at + len(part)
        shown.append(line.rstrip())
    return shown


def test_a_stop_by_ctrl_c_leaves_whole_lines(recipe: Path, tmp_path: Path) -> None:
    """The sentence in a line of its own, no half of a bar before it, no word of a launcher's."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    process = forkserver.popen(
        train(recipe, tmp_path / "run", "optim.epochs=300"),
        cwd=ROOT,
        env=environment(TERM="xterm", CI=""),
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    output, told = "", False
    # Ended by EIO, when nobody has the terminal any more.
    with contextlib.suppress(OSError):
        while piece := os.read(ours, 65536):
            output += piece.decode(errors="replace")
            if "images/s" in output and not told:
                told = True
                process.send_signal(signal.SIGINT)
    os.close(ours)
    assert process.wait(60) == 128 + signal.SIGINT, output
    assert "\r" in output and "|" in output, "a bar was there"
    lines = lines_of(output.replace("\r\n", "\n"))
    assert len([line for line in lines if line.startswith("stopped by SIGINT at step ")]) == 1, (
        lines
    )
    assert not [line for line in lines if "stopped by" in line and not line.startswith("stopped")]
    assert "ERROR" not in output and "Traceback" not in output
    bars = [line for line in lines if re.match(r"epoch \d+/300 \|", line)]
    assert bars == [], "nothing of a bar is left standing"
