"""Processes that begin with everything imported: forked from one clean process, kept for the tests.

A program that imports torch, DeepSpeed and the launcher spends seconds of CPU before its first
line. `popen` and `run` give the same as those of `subprocess`, for a Python command: a process of
its own, with its own arguments, folder, environment, files, signals and exit code, but forked from
a server that has done the imports once. The server is started by the first call and ends with the
tests. Not for commands that must start an interpreter: those are `subprocess`' own.

What is read while Python starts or while modules are imported is the server's, not the command's:
OMP_NUM_THREADS is 1 and DS_ACCELERATOR is cpu in all of them.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import pkgutil
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FORCED = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
_DROPPED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What a process shows as its command line is written over the server's: this makes room for it.
_ROOM = "x" * 8_000
_NUMBER = struct.Struct("i")
_LARGEST_REQUEST = 200_000
_PACKAGES = ("launcher", "data", "sclcore")
_MODULES = ("deepspeed", "timm", "torchvision.transforms.v2", "matplotlib.pyplot", "wandb")
# One starts a rank, one is built only where its headers are, and one comes to pyarrow by
# scikit-learn, whose allocator starts a thread.
_NOT_IMPORTED = ("launcher.train", "data.images._crop", "data.sources.digits")
_ENDED = "the fork server of the tests has ended: its words are with the first test that failed"


class Popen(subprocess.Popen[Any]):
    """`subprocess.Popen` of a Python command, forked from the server."""

    _status: socket.socket

    def __init__(self, command: Sequence[str | Path], *, enter: int = 0, **options: Any) -> None:
        self._enter = enter
        super().__init__(command, **options)

    def _execute_child(self, args: Any, *rest: Any) -> None:
        # executable, preexec_fn, close_fds, pass_fds, then these two; all else is as by default.
        cwd, environment = rest[4:6]
        pipes = rest[9:15]
        new_session = rest[20]
        here = [pipe if pipe != -1 else i for i, pipe in enumerate((pipes[0], pipes[3], pipes[5]))]
        command = [os.fspath(part) for part in args]
        assert command[0] == sys.executable and rest[1] is None, command
        self._status, theirs = socket.socketpair()
        request = {
            "arguments": command[1:],
            "folder": os.fspath(cwd or Path.cwd()),
            "environment": dict(os.environ if environment is None else environment),
            "new_session": bool(new_session),
            "enter": self._enter,
        }
        with theirs:
            _server().ask(request, [*here, theirs.fileno()])
        self.pid = self._next_number()
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _next_number(self) -> int:
        message = self._status.recv(_NUMBER.size)
        if not message:
            raise RuntimeError(_ENDED)
        return _NUMBER.unpack(message)[0]

    def _internal_poll(self, _deadstate: int | None = None) -> int | None:
        if self.returncode is None and _readable(self._status, 0):
            self.returncode = os.waitstatus_to_exitcode(self._next_number())
            self._status.close()
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None and not _readable(self._status, timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        code = self._internal_poll()
        assert code is not None
        return code


def popen(command: Sequence[str | Path], **options: Any) -> Popen:
    """Start `command`, which begins with `sys.executable`; options as of `subprocess.Popen`.

    stdin, stdout, stderr, text, cwd, env and start_new_session are heeded; with `enter` it runs in
    the namespaces of the process of that number, and can only be killed.
    """
    return Popen(command, **options)


def run(
    command: Sequence[str | Path],
    *,
    timeout: float | None = None,
    check: bool = False,
    capture_output: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """As `subprocess.run`."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with popen(command, **options) as process:
        try:
            said, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    if check and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args, said, errors)
    return subprocess.CompletedProcess(process.args, process.returncode, said, errors)


def _readable(connection: socket.socket, timeout: float | None) -> bool:
    return bool(select.select([connection], [], [], timeout)[0])


class _Server:
    """The server, and this side's end of the connection with whose end it ends too."""

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._turn = threading.Lock()
        self._owner = os.getpid()
        kept = {name: value for name, value in os.environ.items() if name not in _DROPPED}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forkserver", str(theirs.fileno()), _ROOM],
                cwd=ROOT,
                env=kept | FORCED,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        atexit.register(self._end)

    def _end(self) -> None:
        # Not by every fork of the process that has started it.
        if os.getpid() == self._owner:
            self._connection.close()
            self._process.wait(30)

    def ask(self, request: Mapping[str, Any], files: list[int]) -> None:
        message = json.dumps(request).encode()
        assert len(message) < _LARGEST_REQUEST
        with self._turn:
            try:
                socket.send_fds(self._connection, [message], files)
            except ConnectionError as error:
                raise RuntimeError(_ENDED) from error


_started: list[_Server] = []


def _server() -> _Server:
    if not _started:
        _started.append(_Server())
    return _started[0]


def import_everything() -> None:
    """All that a command or a rank could import."""
    for name in _MODULES:
        importlib.import_module(name)
    for name in _PACKAGES:
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            if module.name not in _NOT_IMPORTED:
                # Kernels for hardware or libraries that are not there.
                with contextlib.suppress(ImportError):
                    importlib.import_module(module.name)


if __name__ == "__main__":
    from tests.forked import serve

    import_everything()
    serve(socket.socket(fileno=int(sys.argv[1])), _NUMBER, _LARGEST_REQUEST)
