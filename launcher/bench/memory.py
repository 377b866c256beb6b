"""The memory that one engine takes, in a process of its own.

    python -m launcher.bench.memory ENGINE FILE IMAGES THREADS

imports what the engine needs and reads the images (.npy), then loads FILE and runs it twice; prints
a line of JSON: bytes resident before, and at the peak since. Resident is what Linux counts: the
code of libraries is in it, from its first use on.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.bench.sessions import ENGINES

if TYPE_CHECKING:
    from torch import Tensor

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_SECONDS = 600


@dataclass(frozen=True)
class Memory:
    """Bytes resident `before` the model is loaded, and at the `peak`."""

    before: int
    peak: int


def measured(engine: str, file: Path, images: Path, threads: int) -> Memory:
    """Raises OSError where the system does not tell, or the process did not end well."""
    if not _CLEAR.exists():
        raise OSError("the peak of a process is read from /proc of Linux, which is not here")
    command = [sys.executable, "-m", __name__, engine, str(file), str(images), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"{engine} in a process of its own: {last}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def measured_here(model: Callable[[Tensor], object], images: Path, threads: int) -> Memory:
    """The same of a PyTorch module, which the process is sent once its imports are done.

    Raises OSError as `measured` does.
    """
    if not _CLEAR.exists():
        raise OSError("the peak of a process is read from /proc of Linux, which is not here")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_model, args=(theirs, images, threads), daemon=True)
    process.start()
    theirs.close()
    try:
        ours.send(model)
        if not ours.poll(_SECONDS):
            raise OSError(f"torch in a process of its own: nothing came in {_SECONDS} s")
        return ours.recv()
    except (EOFError, BrokenPipeError):
        process.join()
        raise OSError(
            f"torch in a process of its own: it ended with code {process.exitcode}"
        ) from None
    finally:
        process.kill()
        process.join()


def _run_model(pipe: Connection, images: Path, threads: int) -> None:
    import numpy
    import torch

    # What models are made of: imported before the memory counts, as torch is.
    importlib.import_module("launcher.bench.forms")
    importlib.import_module("launcher.models")
    torch.set_num_threads(threads)
    batch = numpy.load(images)
    _CLEAR.write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    model = pipe.recv()
    with torch.inference_mode():
        for _ in range(2):
            model(torch.from_numpy(batch))
    pipe.send(Memory(before, _resident("VmHWM")))


def main() -> None:
    engine, file, images, threads = sys.argv[1:]
    import numpy

    batch = numpy.load(images)
    load = ENGINES[engine](Path(file), int(threads))
    # From here on the peak counts anew (man 5 proc, clear_refs).
    _CLEAR.write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    run = load()
    for _ in range(2):
        run(batch)
    print(json.dumps({"before": before, "peak": _resident("VmHWM")}))


def _resident(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"))
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
