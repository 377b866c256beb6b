"""Where the ranks of a run are, told to each other through the store of the rendezvous."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psutil
from torch._C._distributed_c10d import PrefixStore, TCPStore

from launcher.cluster.world import World, attempt

_POLL_S = 0.2


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a rank is. `beats` counts what all ranks do alike: the one with fewer is behind."""

    beats: int
    step: int
    doing: str

    def __str__(self) -> str:
        return f"step {self.step:,}, {self.doing}"


@dataclasses.dataclass(frozen=True)
class Process:
    """A rank as its machine knows it; those of one `space` see each other's numbers."""

    space: str
    pid: int
    created: float

    @classmethod
    def this(cls) -> Process:
        namespace = Path("/proc/self/ns/pid")
        number = namespace.stat().st_ino if namespace.exists() else 0
        return cls(f"{socket.gethostname()}/{number}", os.getpid(), psutil.Process().create_time())

    def kill_beside(self, other: Process) -> bool:
        """Kill `other`, if it is of the same machine and still there; returns whether it was."""
        if other.space != self.space:
            return False
        try:
            process = psutil.Process(other.pid)
            if process.create_time() != other.created:
                return False
            process.kill()
        except psutil.Error:
            return False
        return True


@dataclasses.dataclass(frozen=True)
class Answers:
    """Where the ranks are that answer (`here`), and where the others were `before`.

    Only the lowest rank that answers knows all of it, and says it; the others know its answer.
    """

    here: dict[int, Position]
    before: dict[int, Position]


class Exchange:
    """One rank's connection to the store: its own, so that a call that hangs stops nothing else."""

    def __init__(self, world: World, position: Callable[[], Position], tick_s: float) -> None:
        self.given_up = threading.Event()
        self._world = world
        self._position = position
        self._tick_s = tick_s
        self._wake = threading.Event()
        self._closed = False
        self._answers: Answers | None = None
        self._answered = threading.Event()
        self._answer_within_s: float | None = None
        address = (world.master_addr, world.master_port)
        store = TCPStore(*address, is_master=False, wait_for_workers=False)
        store.set_timeout(timedelta(seconds=30))
        self._store = PrefixStore(f"watchdog/{attempt()}", store)

    def run(self) -> None:
        """Publish the position each tick, and look whether some rank has given up."""
        try:
            while not self._closed and self._answer_within_s is None:
                self._store.set(f"at/{self._world.rank}", self._own())
                if self._store.check(["given up"]):
                    self.given_up.set()
                self._wake.wait(self._tick_s)
            if self._answer_within_s is not None:
                self._answers = self._ask(self._answer_within_s)
        except RuntimeError:
            # The store is gone, and with it rank 0. The loop learns that from gloo or NCCL.
            return
        finally:
            self._answered.set()

    def close(self) -> None:
        """Ask nothing more of the store."""
        self._closed = True
        self._wake.set()

    def collect(self, within_s: float) -> Answers | None:
        """Make all ranks give up, and return who answers; None if the store does not."""
        self._answer_within_s = within_s
        self._wake.set()
        # The thread makes its last calls after its own deadline.
        self._answered.wait(within_s + 2)
        return self._answers

    def _ask(self, within_s: float) -> Answers:
        rank, size = self._world.rank, self._world.world_size
        self._store.set(f"answer/{rank}", self._own())
        self._store.set("given up", "")
        deadline = time.monotonic() + within_s
        count = self._store.add("answers", 1)
        while count < size and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            count = self._store.add("answers", 0)
        for lower in range(rank):
            if answer := self._read(f"answer/{lower}"):
                return Answers(here={lower: answer, rank: self._position()}, before={})
        answers = {r: self._read(f"answer/{r}") for r in range(size)}
        here = {r: position for r, position in answers.items() if position}
        silent = (r for r in range(size) if r not in here)
        never = Position(0, 0, "starting")
        return Answers(here, {r: self._read(f"at/{r}") or never for r in silent})

    def _own(self) -> str:
        return json.dumps(dataclasses.asdict(self._position()))

    def _read(self, key: str) -> Position | None:
        """The position at `key`, if it is there: waiting for it would hold up the report."""
        if not self._store.check([key]):
            return None
        return Position(**json.loads(self._store.get(key)))
