"""Two real ranks of one run: started, watched, signalled, and never left behind."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

import psutil

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
WORLD = 2
_MARK = "SCL_FAULTS_START"
_DROPPED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

Launcher = Literal["scl train", "by hand"]


class Ranks:
    """One start of a run, by `scl train` or by hand (the variables RANK … set, as srun does).

    A context: at its end nothing that it started is alive. What all its processes print goes, in
    order of time, to one file, read by `output`.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        launcher: Launcher,
        program: str = "launcher.train",
        **environment: str,
    ) -> None:
        self.launcher: Launcher = launcher
        self.log = log
        self._mark = secrets.token_hex(8)
        self._arguments = list(arguments)
        self._program = program
        kept = {
            key: value
            for key, value in os.environ.items()
            if key not in _DROPPED and not key.startswith(("SLURM", "WANDB", "SCL_", "COLUMNS"))
        }
        forced = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", _MARK: self._mark}
        self._environment = kept | forced | environment
        self._started: list[subprocess.Popen[bytes]] = []
        self.began = time.monotonic()

    def __enter__(self) -> Ranks:
        self.began = time.monotonic()
        if self.launcher == "scl train":
            self._start(["-m", "launcher.cli", "train", "--ranks", str(WORLD), *self._arguments])
            return self
        port = free_port()
        for rank in range(WORLD):
            self._start(
                ["-m", self._program, *self._arguments],
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(WORLD),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.sweep()

    def _start(self, command: list[str], **more: str) -> None:
        with self.log.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=self._environment | more,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)

    def alive(self) -> list[psutil.Process]:
        """Every process of this start that is not yet gone, data workers and launchers too."""
        for process in self._started:
            process.poll()
        return [p for p in psutil.process_iter() if self._is_ours(p)]

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes that are ranks now, by number."""
        numbers = {p.pid: number for p in self.alive() if (number := _rank_of(p)) is not None}
        found = {}
        for pid, number in numbers.items():
            try:
                process = psutil.Process(pid)
                # A data worker has its rank's variables; it is below the rank.
                if process.ppid() not in numbers:
                    found[number] = process
            except psutil.NoSuchProcess:
                continue
        return found

    def kill_all(self) -> None:
        """SIGKILL to every process of this start, launchers first so that none can clean up."""
        alive = self.alive()
        ranks = {process.pid for process in self.ranks().values()}
        for process in sorted(alive, key=lambda p: p.pid in ranks):
            _send(process, signal.SIGKILL)

    def kill_launchers(self) -> None:
        """SIGKILL to everything but the ranks and what is below them."""
        ranks = self.ranks().values()
        spared = {p.pid for rank in ranks for p in (rank, *rank.children(recursive=True))}
        for process in self.alive():
            if process.pid not in spared:
                _send(process, signal.SIGKILL)

    def ask_to_stop(self, number: signal.Signals) -> None:
        """Send a signal as a user or a cluster does: to `scl train`, or to each rank."""
        for process in self._started:
            if process.poll() is None:
                process.send_signal(number)

    def codes(self) -> list[int | None]:
        """The exit codes of what was started: one for `scl train`, one a rank by hand."""
        return [process.poll() for process in self._started]

    def output(self) -> str:
        """Everything printed so far by this start."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_gone(self, limit_s: float) -> float | None:
        """Seconds until nothing of this start is alive; None if something outlives the limit."""
        began = time.monotonic()
        # One that is just ending has no environment any more, and no exit code yet.
        while self.alive() or None in self.codes():
            if time.monotonic() - began > limit_s:
                return None
            time.sleep(0.05)
        return time.monotonic() - began

    def sweep(self) -> list[str]:
        """Kill what is left of this start; what it was."""
        left = []
        for process in self.alive():
            try:
                left.append(f"{process.pid} {process.status()} {' '.join(process.cmdline())[:80]}")
            except psutil.Error:
                continue
        while self.alive():
            self.kill_all()
            time.sleep(0.02)
        for process in self._started:
            process.wait()
        return left

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return (
                process.environ().get(_MARK) == self._mark
                and process.status() != psutil.STATUS_ZOMBIE
            )
        except psutil.Error:
            return False


def clean(output: str) -> list[str]:
    """The lines of an output without empty ones and control characters."""
    lines = (re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", line).rstrip() for line in output.split("\n"))
    return [line for line in lines if line]


def wait_for(condition: Callable[[], bool], limit_s: float, every_s: float = 0.005) -> bool:
    """Whether `condition` came true within `limit_s` seconds."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every_s)
    return True


def _rank_of(process: psutil.Process) -> int | None:
    try:
        # A rank that `scl train` has forked shows the environment that it was forked with.
        if named := re.fullmatch(r"scl-rank-(\d+)", process.name()):
            return int(named[1])
        number = process.environ().get("RANK")
        return None if number is None else int(number)
    except psutil.Error:
        return None


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
