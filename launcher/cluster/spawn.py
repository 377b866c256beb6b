"""`scl train` with several ranks: DeepSpeed's launcher as a child, signals passed on to ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil
import torch

from launcher.cluster.world import free_port
from launcher.engine import accelerator
from launcher.errors import UsageError
from launcher.terminal import say

_TRAIN = Path(__file__).parents[1] / "train.py"


def train_on_ranks(ranks: int, arguments: Sequence[str]) -> int:
    """Start `ranks` processes of launcher/train.py on this machine and wait; returns the exit code.

    Raises UsageError when there are GPUs, but fewer than ranks.

    SIGTERM, SIGUSR1 and SIGINT go to the ranks, which save and stop; a second SIGINT kills them.
    """
    if accelerator() == "cuda" and ranks > torch.cuda.device_count():
        raise UsageError(
            f"{ranks} ranks were asked for and this machine has {torch.cuda.device_count()} GPU(s):"
            " take fewer with --ranks, or run on the CPU with DS_ACCELERATOR=cpu"
        )
    environment = os.environ | {
        "SCL_PARENT_PID": str(os.getpid()),
        "DS_ACCELERATOR": accelerator(),
        # DeepSpeed's launcher leaves it to the library, which takes every core on each rank.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *("--num_accelerators", str(ranks)),
        *("--master_addr", os.environ.get("MASTER_ADDR", "127.0.0.1")),
        *("--master_port", os.environ.get("MASTER_PORT", str(free_port()))),
        # A hostfile of the machine's must not turn this into a multi-node run.
        *("--no_local_rank", "--log_level", "error", "--hostfile", os.devnull),
        *(str(_TRAIN), *arguments),
    ]
    # In a session of its own, so that Ctrl-C reaches the ranks through us alone, and once.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    with _PassedOn(process):
        code = process.wait()
    if code > 128 + signal.NSIG or code < 0:
        number = 256 - code if code > 0 else -code
        say(
            f"error: a rank was killed by {signal.Signals(number).name} (out of memory, if nobody "
            "sent it); the others were ended; the same command continues from the last checkpoint"
        )
        return 1
    return code


class _PassedOn:
    """While in this context, signals to this process go to the ranks below `process`."""

    _SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._interrupts = 0

    def __enter__(self) -> None:
        self._former = {number: signal.signal(number, self._handle) for number in self._SIGNALS}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os.killpg(self._process.pid, signal.SIGKILL)
            return
        for rank in self._ranks():
            rank.send_signal(number)

    def _ranks(self) -> list[psutil.Process]:
        """The runner starts a launcher, which starts the ranks."""
        try:
            return [
                rank
                for launcher in psutil.Process(self._process.pid).children()
                for rank in launcher.children()
            ]
        except psutil.NoSuchProcess:
            return []
