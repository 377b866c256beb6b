"""A process that the tests fork is to whoever looks at it what a started one is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests import forkserver
from tests.ports import free_port

WHOLE = """
import os, sys
print(sys.argv[1:], os.getcwd(), os.environ["GIVEN"], os.environ.get("PATH"), sys.stdin.read())
print("aside", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


def test_arguments_folder_environment_files_and_code(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WHOLE, "7", "two words"]
    options = {"cwd": tmp_path, "env": {"GIVEN": "this"}, "text": True}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    forked, started = (make(command, **options, **pipes) for make in _BOTH)
    said = [process.communicate("asked\n", timeout=60) for process in (forked, started)]
    assert said[0] == said[1]
    assert said[0] == (f"['7', 'two words'] {tmp_path} this None asked\n\n", "aside\n")
    assert forked.returncode == started.returncode == 7


_BOTH = (forkserver.popen, subprocess.Popen)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals(number: signal.Signals) -> None:
    code = "import time; print('up', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code]
    with forkserver.popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        seen = psutil.Process(process.pid)
        assert seen.cmdline()[:3] == command and os.getpgid(seen.pid) == seen.pid
        process.send_signal(number)
        assert process.wait(20) == -number
    assert not psutil.pid_exists(process.pid)


def test_a_module_runs_as_main_and_a_file_finds_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("import sys\nprint(sys.modules['__main__'].__name__)\n")
    (tmp_path / "file.py").write_text("import beside\nassert __name__ == '__main__'\n1 / 0\n")
    done = forkserver.run([sys.executable, tmp_path / "file.py"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "__main__\n")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    command = [sys.executable, "-m", "launcher.train", "--help"]
    done = forkserver.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: launcher/train.py")
    assert done.stderr == ""


def test_no_port_is_given_twice() -> None:
    assert len({free_port() for _ in range(20)}) == 20
