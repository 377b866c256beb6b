"""The runtime's C source as one file, and the libraries that the machine's compiler makes of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from sclcore.export.files import ExportError
from sclcore.kernels.compiler import cache, find_compiler

_SOURCES = Path(__file__).with_name("c")
_COPIED = ("scl.h", "Makefile")
_INCLUDE = re.compile(r'#include "([\w.]+)"\n')
_SECONDS = 300
LIBRARIES = ("libscl.so", "libscl.a")


def one_source() -> str:
    """scl.c with the parts that it includes in their places; only scl.h is left beside it."""
    seen: set[str] = set()

    def inlined(match: re.Match[str]) -> str:
        name = match[1]
        if name in _COPIED:
            return match[0]
        # The kernels are read once for each set of instructions.
        if name in seen and name != "kernels.inc":
            return ""
        seen.add(name)
        return _INCLUDE.sub(inlined, (_SOURCES / name).read_text(encoding="utf-8"))

    return _INCLUDE.sub(inlined, (_SOURCES / "scl.c").read_text(encoding="utf-8"))


def write_sources(folder: Path) -> list[str]:
    """Everything that is compiled, the Makefile and the Python wrapper; their names."""
    (folder / "scl.c").write_text(one_source(), encoding="utf-8")
    for name in _COPIED:
        shutil.copyfile(_SOURCES / name, folder / name)
    shutil.copyfile(Path(__file__).with_name("sclrun.py"), folder / "sclrun.py")
    return ["scl.c", *_COPIED, "sclrun.py"]


def compile_sources(folder: Path, flags: Sequence[str] = ("-O3",)) -> None:
    """Make libscl.so and libscl.a in `folder` by its Makefile, or take those of a former export.

    Raises ExportError.
    """
    try:
        compiler = find_compiler()
    except OSError as error:
        raise ExportError(f"--format native: {error}; install one, or name it in CC") from error
    settings = [f"CC={' '.join(compiler)}", f"CFLAGS={' '.join(flags)}"]
    content = [(folder / name).read_bytes() for name in ("scl.c", *_COPIED)]
    key = hashlib.sha256(b"".join(content) + repr(settings).encode()).hexdigest()[:16]
    kept = [(folder / name, cache() / f"{key}-{name}") for name in LIBRARIES]
    if all(there.exists() for _, there in kept):
        for here, there in kept:
            _copy(there, here)
        return
    _make(["make", "-s", "-C", str(folder), *settings], compiler[0])
    (folder / "scl.o").unlink(missing_ok=True)
    # The next export need not wait; where nothing can be kept, it has to.
    with contextlib.suppress(OSError):
        cache().mkdir(parents=True, exist_ok=True)
        for here, there in kept:
            _copy(here, there)


def _copy(source: Path, target: Path) -> None:
    """As a new file: one that a process has loaded must not change."""
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, beside)
    beside.replace(target)


def _make(command: list[str], compiler: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except FileNotFoundError:
        raise ExportError("--format native: there is no make here; install it") from None
    except subprocess.TimeoutExpired:
        raise ExportError(f"--format native: {compiler} did not end in {_SECONDS} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        reason = (lines or done.stderr.splitlines() or ["no message"])[0]
        raise ExportError(f"--format native: {compiler} failed: {reason}")
