"""A rank of a real run that gets SIGUSR1 right after an update: `SCL_TEST_STOP=step:rank`."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from launcher.run import loop
from launcher.train import main


def stop_after(step: int, rank: int) -> None:
    """Let this process signal itself, as Slurm would, once `step` updates are done."""
    ordinary = loop.train_step

    def train_step(learner: Any, course: Any, batches: Any, accumulation: int, *rest: Any) -> None:
        ordinary(learner, course, batches, accumulation, *rest)
        progress, _ = rest
        if progress.step == step and learner.world.rank == rank:
            os.kill(os.getpid(), signal.SIGUSR1)

    loop.train_step = train_step


if __name__ == "__main__":
    # Data workers import this module anew, and are no ranks.
    step, rank = map(int, os.environ["SCL_TEST_STOP"].split(":"))
    stop_after(step, rank)
    code = main()
    sys.stdout.flush()
    os._exit(code)
