"""The memory that one engine takes, in a process of its own.

    python -m launcher.bench.memory ENGINE FILE IMAGES THREADS

imports what the engine needs and reads the images (.npy), then loads FILE and runs it twice; prints
a line of JSON: bytes resident before, and at the peak since. Resident is what Linux counts: the
code of libraries is in it, from its first use on.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from launcher.bench.sessions import ENGINES

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
