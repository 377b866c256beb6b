"""A campaign in namespaces of its own: what it starts or mounts cannot outlive it.

`python -m tests.faults.contain …` is process 1 of such a namespace: it starts the campaign, reaps
every orphan that a killed launcher leaves, and with its end the kernel kills whatever is still
running in there and takes its mounts away, also when the campaign itself is killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence

_INSIDE = "SCL_FAULTS_CONTAINED"
_UNSHARE = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
# Whoever is not root may be root of a user namespace, where the kernel allows that.
_WAYS = (_UNSHARE, (*_UNSHARE, "--user", "--map-root-user"))


def is_contained() -> bool:
    """Whether this process runs inside already."""
    return os.environ.get(_INSIDE) == "1"


def way_in() -> tuple[str, ...] | None:
    """The command that makes such namespaces; None where that is not allowed."""
    if shutil.which("unshare") is None:
        return None
    for way in _WAYS:
        if subprocess.run([*way, "true"], capture_output=True, check=False).returncode == 0:
            return way
    return None


def enter(arguments: Sequence[str]) -> None:
    """Start this program again inside, in place of this process; returns where that cannot be."""
    way = way_in()
    if way is None:
        return
    os.environ[_INSIDE] = "1"
    sys.stdout.flush()
    os.execvp(way[0], [*way, sys.executable, "-m", "tests.faults.contain", *arguments])


def main(arguments: Sequence[str]) -> int:
    """Process 1: run the campaign, reap orphans; returns the campaign's exit code."""
    campaign = subprocess.Popen([sys.executable, "-m", "tests.faults", *arguments])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(campaign.pid, number))
    while True:
        pid, status = os.wait()
        if pid == campaign.pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
