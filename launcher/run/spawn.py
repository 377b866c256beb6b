"""The ranks of one machine: forked from the process that has imported and checked everything.

A rank is a process of its own that begins with all that `scl train` knows: no module is imported
and no check is made twice. On GPUs too: nothing here touches CUDA before the fork.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import sys
import time
import types
from collections.abc import Callable
from types import FrameType

import torch

from launcher.cluster import rendezvous
from launcher.cluster.accelerator import accelerator
from launcher.cluster.process import end_with_parent, fork, name_rank, stops
from launcher.cluster.world import World
from launcher.errors import UsageError
from launcher.run.prepare import Prepared
from launcher.run.rank import run_rank
from launcher.terminal import Waiting, say

# Time for a rank to save, to log its last lines, and to say what made it end.
_OTHERS_END_WITHIN_S = 30.0
_THE_REST_ENDS_WITHIN_S = 10.0
_KILLED_ARE_GONE_WITHIN_S = 10.0
_POLL_S = 0.02


def train_on_ranks(prepared: Prepared) -> int:
    """Train on as many ranks of this machine as the inputs are for; returns the exit code.

    Raises UsageError when there are GPUs, but fewer than ranks, or MASTER_PORT is taken.

    SIGTERM, SIGUSR1, SIGINT and SIGHUP go to the ranks, which save and stop; a second SIGINT
    kills them.
    """
    size = prepared.inputs.world_size
    if accelerator() == "cuda" and size > torch.cuda.device_count():
        raise UsageError(
            f"{size} ranks were asked for and this machine has {torch.cuda.device_count()} GPU(s):"
            " take fewer with --ranks, or run on the CPU with DS_ACCELERATOR=cpu"
        )
    os.environ["DS_ACCELERATOR"] = accelerator()
    os.environ["SCL_PARENT_PID"] = str(os.getpid())
    if accelerator() == "cpu":
        # Here, once for all ranks. Not with GPUs: its import looks for them, which each rank must
        # do for itself, after the fork.
        with Waiting("importing DeepSpeed"):
            import deepspeed  # noqa: F401
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    listening = rendezvous.listen(address, int(os.environ.get("MASTER_PORT", "0")))
    port = listening.getsockname()[1]

    def body(rank: int) -> int:
        world = World(
            rank,
            rank,
            size,
            address,
            port,
            source="scl train",
            listening=listening if rank == 0 else None,
        )
        if rank:
            listening.close()
        return run_rank(world, lambda: prepared)

    ranks = Ranks(body, size)
    listening.close()
    return ranks.wait()


class Ranks:
    """Forked processes in one process group, which end together.

    `body(rank)` gives the exit code of each. Signals to this process go to all of them.
    """

    def __init__(self, body: Callable[[int], int], size: int) -> None:
        self._group = 0
        self._interrupts = 0
        self._passed_on = 0
        self._running: set[int] = set()
        self._stops = stops()
        # Signals wait until all ranks are there: one must reach all of them or none.
        signal.pthread_sigmask(signal.SIG_BLOCK, self._stops)
        self._former = {number: signal.signal(number, self._pass_on) for number in self._stops}
        # The collector leaves alone what exists by now: looking at it would copy its pages.
        gc.freeze()
        try:
            self._fork(body, size)
        except BaseException:
            # Where a fork fails, the ranks that are there must not wait for the missing ones.
            self._end()
            raise
        finally:
            gc.unfreeze()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._stops)

    def _fork(self, body: Callable[[int], int], size: int) -> None:
        parent = os.getpid()
        for rank in range(size):
            pid = fork(functools.partial(_as_rank, rank, body, parent, self._group))
            self._group = self._group or pid
            os.setpgid(pid, self._group)
            self._running.add(pid)

    def wait(self) -> int:
        """Until all have ended. Returns the code of the first that failed, or else 0."""
        try:
            while self._running:
                if code := self._next():
                    self._end_others(code)
                    return self._verdict(code)
            return 0
        finally:
            self._end()

    def _end(self) -> None:
        """Leave no process of the group, and signals as they were before."""
        self._wait_for_the_rest()
        self._kill()
        began = time.monotonic()
        while self._running and time.monotonic() < began + _KILLED_ARE_GONE_WITHIN_S:
            if self._next(wait=False) is None:
                time.sleep(_POLL_S)
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _wait_for_the_rest(self) -> None:
        """Let what the ranks have started end by itself: W&B's service still writes its files."""
        began = time.monotonic()
        while not self._running and self._interrupts < 2 and self._send_to_group(0):
            if time.monotonic() > began + _THE_REST_ENDS_WITHIN_S:
                return
            time.sleep(_POLL_S)

    def _next(self, *, wait: bool = True) -> int | None:
        """The code of the next rank to end, negative if a signal did it; None if none has yet."""
        pid, status = os.waitpid(-self._group, 0 if wait else os.WNOHANG)
        if not pid:
            return None
        self._running.discard(pid)
        return os.waitstatus_to_exitcode(status)

    def _end_others(self, code: int) -> None:
        """After the first has ended with `code`: wait for the others, and see that they end."""
        began = asked = time.monotonic()
        while self._running and time.monotonic() < began + _OTHERS_END_WITHIN_S:
            # SIGTERM ends a rank that waits for the dead one; a rank that is saving notes it and
            # goes on. Sent again, since a rank may not have heard it yet. After a stop (a code
            # above 128) nothing is sent: all ranks have agreed on it and end by themselves.
            if code <= 128 and time.monotonic() >= asked:
                self._send(signal.SIGTERM)
                asked += 1.0
            if self._next(wait=False) is None:
                time.sleep(_POLL_S)

    def _verdict(self, code: int) -> int:
        if code >= 0:
            return code
        if self._interrupts > 1:
            say("killed by a second SIGINT; the same command continues from the last checkpoint")
            return 128 + signal.SIGINT
        name = signal.Signals(-code).name
        if -code == self._passed_on:
            say(f"stopped by {name} before there was anything to save")
            return 128 - code
        say(
            f"error: a rank was killed by {name} (out of memory, if nobody sent it); the others "
            "were ended; the same command continues from the last checkpoint"
        )
        return 1

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        self._passed_on = number
        if self._interrupts > 1:
            self._kill()
        else:
            self._send(number)

    def _send(self, number: int) -> None:
        for pid in self._running:
            # It may have ended, and been waited for, just before.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _kill(self) -> None:
        self._send_to_group(signal.SIGKILL)

    def _send_to_group(self, number: int) -> bool:
        """To the ranks, and what they have started that stayed in their group; if there are any."""
        # Before the first rank is there, the group 0 would be this process's own.
        if not self._group:
            return False
        try:
            os.killpg(self._group, number)
        except ProcessLookupError:
            return False
        return True


def _as_rank(rank: int, body: Callable[[int], int], parent: int, group: int) -> int:
    """Run `body` in a forked process, once what it must not inherit is undone."""
    os.setpgid(0, group)
    name_rank(rank)
    end_with_parent(parent)
    # Data workers import their parent's main module: the command line, of which they use nothing.
    sys.modules["__main__"] = types.ModuleType("__main__")
    return body(rank)
