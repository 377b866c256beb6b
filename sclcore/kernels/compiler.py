"""C source → a loaded library, by whatever C compiler the machine has, kept between processes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

_SECONDS = 60
_FLAGS = ("-std=c11", "-O3", "-fPIC", "-shared")
# One rounding per operation that is written, as in the source; no errno and no traps, or the
# compiler could not vectorise.
_ARITHMETIC = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")


def load(source: Path) -> ctypes.CDLL:
    """The library that `source` compiles to, from the user's cache where it is there already.

    Ranks that compile at the same time replace each other's file by an equal one. Raises OSError
    where there is no compiler, or it fails, or the library does not load.
    """
    command = [*find_compiler(), *_FLAGS, *_ARITHMETIC, *_instructions()]
    key = hashlib.sha256(source.read_bytes() + repr(command).encode()).hexdigest()[:16]
    with tempfile.TemporaryDirectory(prefix="sclcore-") as scratch:
        made = Path(scratch) / f"{source.stem}-{key}.so"
        kept = cache() / made.name
        if not kept.exists():
            _compile([*command, str(source), "-o", str(made), "-lm"])
            kept = _keep(made, kept)
        # A loaded library stays loaded when its file is gone.
        return ctypes.CDLL(str(kept))


def cache() -> Path:
    """The folder that compiled libraries are kept in: $XDG_CACHE_HOME/sclcore."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sclcore"


def find_compiler() -> list[str]:
    """The command of a C compiler: $CC, else the first known one. Raises OSError without any."""
    chosen = shlex.split(os.environ.get("CC", ""))
    if chosen and not shutil.which(chosen[0]):
        raise OSError(f"there is no C compiler {chosen[0]}, which CC names")
    if chosen:
        return chosen
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise OSError("no C compiler found (cc, gcc or clang)")


def _instructions() -> list[str]:
    """The flags for what this CPU has: a cluster's nodes may share a cache and yet differ."""
    import torch  # takes a second, which asking for a compiler should not

    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    if platform.machine().lower() in ("x86_64", "amd64") and wide:
        return ["-mavx2", "-mfma"]
    return []


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} did not end within {_SECONDS} s") from None
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[0]
        raise OSError(f"{command[0]} failed: {reason}")


def _keep(made: Path, kept: Path) -> Path:
    """Move the library to where the next process looks for it; stay where that cannot be."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        beside = kept.with_name(f".{kept.name}.{platform.node()}.{os.getpid()}")
        shutil.copyfile(made, beside)
        beside.replace(kept)
    except OSError:
        return made
    return kept
