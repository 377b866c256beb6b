"""The server's side of `tests.forkserver`: forks, becomes the command, and tells how it ended."""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
import threading
import traceback
import types
from multiprocessing import util
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

_SET_PARENT_DEATH_SIGNAL = 1


def serve(asked: socket.socket, number: struct.Struct, largest: int) -> None:
    """Fork a process for each request, and report its pid and its end, until nobody asks."""
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    assert len(threads) == 1, f"threads {threads}: what they hold would be lost in a fork"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake)
    reports: dict[int, socket.socket] = {}
    gc.collect()
    gc.freeze()
    while True:
        ready, _, _ = select.select([asked, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _reap(reports, number)
        if asked in ready:
            message, files, _, _ = socket.recv_fds(asked, largest, 4)
            if not message:
                return
            pid = os.fork()
            if pid == 0:
                for own in (asked, *reports.values()):
                    own.close()
                for own in (woken, wake):
                    os.close(own)
                request = json.loads(message)
                with socket.socket(fileno=files[3]) as report:
                    pid = os.getpid()
                    if request["enter"]:
                        _enter(request["enter"])
                    _prepare(request, files[:3])
                    report.send(number.pack(pid))
                _become(request["arguments"])
            reports[pid] = socket.socket(fileno=files[3])
            for file in files[:3]:
                os.close(file)


def _reap(reports: dict[int, socket.socket], number: struct.Struct) -> None:
    while reports:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with reports.pop(pid) as report:
            try:
                report.send(number.pack(status))
            except BrokenPipeError:
                continue


def _enter(pid: int) -> None:
    """Go on in the namespaces of another process; this one waits there, and ends as that does."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("net", "uts", "pid", "mnt"):
        with Path(f"/proc/{pid}/ns/{kind}").open("rb") as namespace:
            if libc.setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"cannot enter the {kind} namespace of {pid}")
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Only what is forked from here on is in the namespace of process numbers.
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        # As a shell says that a signal did it.
        os._exit(code if code >= 0 else 128 - code)
    libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _prepare(request: dict[str, Any], files: list[int]) -> None:
    """Undo what this fork has from the server: by now nobody can see what it came from."""
    # At its own end it would remove what is the server's, such as W&B's folder for media.
    atexit._clear()
    atexit.register(util._exit_function)  # type: ignore[attr-defined]
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A group of its own, as a shell gives each command; the server's must outlive it.
    if request["new_session"]:
        os.setsid()
    else:
        os.setpgid(0, 0)
    for place, file in enumerate(files):
        os.dup2(file, place)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    # Python's own generator is seeded anew by a fork, NumPy's is not.
    np.random.seed()
    _open_streams()
    _show([sys.executable, *request["arguments"]])


def _open_streams() -> None:
    """Anew, as an interpreter opens them: those of the server are for another kind of file."""
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    names = {0: ("stdin", "r", "strict"), 1: ("stdout", "w", "strict")}
    names[2] = ("stderr", "w", "backslashreplace")
    for place, (name, mode, usual) in names.items():
        stream = os.fdopen(
            place,
            mode,
            buffering=1 if place == 2 or os.isatty(place) else -1,
            encoding=encoding or "utf-8",
            errors=usual if place == 2 else errors or usual,
            closefd=False,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _become(arguments: list[str]) -> NoReturn:
    code = 1
    try:
        _run(arguments)
        code = 0
    except SystemExit as ended:
        code = _code_of(ended)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
    _end(code)


def _run(arguments: list[str]) -> None:
    """What an interpreter does with its arguments: `-m MODULE …`, `-c CODE …` or `FILE …`."""
    what, *rest = arguments
    # In place of the server's own, which is the root of the checkout.
    folders = {"-m": str(Path.cwd()), "-c": ""}
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = [folders.get(what, str(Path(what).resolve().parent)), *filter(None, named)]
    if what == "-m":
        module, *rest = rest
        # Imported above under its own name, it is to run as `__main__`.
        sys.modules.pop(module, None)
        sys.argv = [module, *rest]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif what == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), main.__dict__)
    else:
        assert not what.startswith("-"), arguments
        sys.argv = arguments
        # In the running of a path the module is taken out of sys.modules again only at the end.
        runpy.run_path(what, run_name="__main__")


def _code_of(ended: SystemExit) -> int:
    if ended.code is None or isinstance(ended.code, int):
        return ended.code or 0
    print(ended.code, file=sys.stderr)
    return 1


def _end(code: int) -> NoReturn:
    """As an interpreter ends, without taking apart every module."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _show(command: list[str]) -> None:
    """Let `ps` show `command`: written over the arguments that the server was started with."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    # Fields 48 and 49 of all; the first two, and the name, are cut off above.
    start, end = (int(fields[i - 3]) for i in (48, 49))
    text = "\0".join(command).encode()[: end - start - 1]
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, text, len(text))
