"""Start real ranks of a worker module; one that fails or hangs is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests import forkserver

ROOT = Path(__file__).parents[2]


def launch(module: str, folder: Path, *more: str, world: int, timeout: float) -> None:
    """`python -m module RANK STORE OUT …` for each rank; STORE and OUT lie in `folder`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    logs = [folder / f"log.{rank}" for rank in range(world)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            processes.append(
                forkserver.popen(
                    [
                        *(sys.executable, "-m", module, str(rank)),
                        *(str(folder / "store"), str(folder / "out"), *more),
                    ],
                    cwd=ROOT,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    deadline = time.monotonic() + timeout
    try:
        for p in processes:
            p.wait(timeout=max(0.0, deadline - time.monotonic()))
    finally:
        for p in processes:
            p.kill()
            p.wait()
    failed = [rank for rank, p in enumerate(processes) if p.returncode]
    report = "\n".join(f"rank {rank}:\n{logs[rank].read_text()[-3000:]}" for rank in failed)
    assert not failed, report
