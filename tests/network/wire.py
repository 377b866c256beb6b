"""The network between the hosts of hosts.py: a switch in user space whose lines can be disturbed.

    python wire.py NAME=PID …

Gives the network namespace of each process an `eth0` of its own and carries frames between them.
A line of JSON on standard input, {"n1": {"delay_s": 0.05, "loss": 0.02, "cut": false}}, disturbs
the line of a host from now on, in both directions; the answer is a line as well. `tc netem` can do
no more, and is missing from many a kernel of virtual machines.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from dataclasses import dataclass

_SET_INTERFACE = 0x400454CA
_TAP_WITHOUT_HEADER = 0x0002 | 0x1000
# Jumbo frames: fewer to carry.
MTU = 9000


@dataclass
class Line:
    """What joins a host to the switch. `loss` is the share of frames that go missing."""

    delay_s: float = 0.0
    loss: float = 0.0
    cut: bool = False


def interface(name: str, pid: int) -> int:
    """Make `eth0` in the network namespace of a process; its frames are read and written here."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    asked = struct.pack("16sH22x", b"scl%d", _TAP_WITHOUT_HEADER)
    made = fcntl.ioctl(tap, _SET_INTERFACE, asked)[:16].rstrip(b"\0").decode()
    subprocess.run(["ip", "link", "set", made, "mtu", str(MTU)], check=True)
    move = ["ip", "link", "set", made, "netns", str(pid), "name", "eth0"]
    subprocess.run(move, check=True)
    return tap


class Switch:
    """Carries frames between the hosts, each at the time at which it is due."""

    def __init__(self, taps: dict[str, int]) -> None:
        self.lines = {name: Line() for name in taps}
        self._taps = taps
        self._names = {tap: name for name, tap in taps.items()}
        self._behind: dict[bytes, str] = {}
        self._due: list[tuple[float, int, str, bytes]] = []
        self._count = itertools.count()
        self._random = random.Random(0)

    def run(self) -> None:
        """Until standard input ends."""
        poll = select.poll()
        for descriptor in (sys.stdin.fileno(), *self._names):
            poll.register(descriptor, select.POLLIN)
        while True:
            until = self._due[0][0] - time.monotonic() if self._due else None
            for descriptor, _ in poll.poll(None if until is None else max(0.0, until * 1000)):
                if descriptor in self._names:
                    self._receive(descriptor)
                elif not self._obey(sys.stdin.readline()):
                    return
            self._deliver()

    def _obey(self, order: str) -> bool:
        for name, changes in json.loads(order or "{}").items():
            self.lines[name] = Line(**changes)
        print("done", flush=True)
        return bool(order)

    def _receive(self, tap: int) -> None:
        sender = self._names[tap]
        for _ in range(64):
            try:
                frame = os.read(tap, MTU + 64)
            except OSError:
                # There is no more; or the host is gone, or its interface is down.
                return
            self._behind[frame[6:12]] = sender
            known = self._behind.get(frame[:6])
            for name in [known] if known else self._taps:
                if name != sender:
                    self._send(sender, name, frame)

    def _send(self, sender: str, receiver: str, frame: bytes) -> None:
        lines = (self.lines[sender], self.lines[receiver])
        for line in lines:
            if line.cut or (line.loss and self._random.random() < line.loss):
                return
        due = time.monotonic() + sum(line.delay_s for line in lines)
        heapq.heappush(self._due, (due, next(self._count), receiver, frame))

    def _deliver(self) -> None:
        while self._due and self._due[0][0] <= time.monotonic():
            _, _, receiver, frame = heapq.heappop(self._due)
            # Full, or down: a frame is lost, as on any wire.
            try:
                os.write(self._taps[receiver], frame)
            except OSError:
                continue


def main(arguments: list[str]) -> None:
    """Join the hosts that are named; says `done` when their interfaces are there."""
    pairs = [argument.split("=") for argument in arguments]
    switch = Switch({name: interface(name, int(pid)) for name, pid in pairs})
    print("done", flush=True)
    switch.run()


if __name__ == "__main__":
    main(sys.argv[1:])
