"""A run over several hosts, one rank on each, as users start one; and what came of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tests import forkserver
from tests.launcher.conftest import ROOT, environment
from tests.network.hosts import Hosts
from tests.ports import free_port

Launcher = Literal["by hand", "torchrun", "deepspeed"]


class Ended(NamedTuple):
    """Exit codes and outputs in the order of hosts, or of DeepSpeed's launcher alone."""

    codes: list[int]
    outputs: list[str]


class Run:
    """Ranks on all hosts: of `by hand`, as srun starts them, each process is one."""

    def __init__(
        self,
        hosts: Hosts,
        launcher: Launcher,
        arguments: Sequence[str | Path],
        *,
        master: str | None = None,
        port: str | None = None,
        ssh_path: str | None = None,
    ) -> None:
        names = [host.name for host in hosts]
        self._port, self._master = port or free_port(), master or names[0]
        self._launcher = launcher
        self._folder = Path(tempfile.mkdtemp(dir=hosts.folder))
        self._hosts, self._arguments = hosts, [str(word) for word in arguments]
        self._processes: list[subprocess.Popen[Any]] = []
        if launcher == "deepspeed":
            assert ssh_path is not None
            self._deepspeed(ssh_path)
            return
        for rank, name in enumerate(names):
            world = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(len(names))}
            rendezvous = {"MASTER_ADDR": self._master, "MASTER_PORT": self._port}
            if launcher == "by hand":
                command = [sys.executable, "-m", "launcher.train", *self._arguments]
                self._start(name, command, **world, **rendezvous)
            else:
                command = [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--nnodes",
                    world["WORLD_SIZE"],
                ]
                command += ["--node_rank", world["RANK"], "--nproc_per_node", "1"]
                command += ["--master_addr", self._master, "--master_port", self._port]
                self._start(name, [*command, "launcher/train.py", *self._arguments])

    def _deepspeed(self, ssh_path: str) -> None:
        folder = Path(ssh_path.split(os.pathsep)[0]).parent
        hostfile, variables = folder / "hostfile", folder / "variables"
        hostfile.write_text("".join(f"{host.name} slots=1\n" for host in self._hosts))
        # Over ssh come no variables but those of this file.
        variables.write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile)]
        command += ["--no_local_rank", "--master_addr", self._master, "--master_port", self._port]
        command += ["launcher/train.py", *self._arguments]
        first = next(iter(self._hosts)).name
        self._start(first, command, PATH=ssh_path, DS_ENV_FILE=str(variables))

    def _start(self, host: str, command: list[str], **variables: str) -> None:
        log = self._folder / f"output-{len(self._processes)}.txt"
        options: dict[str, Any] = {"cwd": ROOT, "env": environment(**variables)}
        with log.open("wb") as output:
            options |= {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            if self._launcher == "by hand":
                process = forkserver.popen(command, enter=self._hosts[host].pid, **options)
            else:
                process = subprocess.Popen(self._hosts[host].command(*command), **options)
        self._processes.append(process)

    @property
    def is_running(self) -> bool:
        """Whether any of what was started has not ended; ranks may outlive DeepSpeed's launcher."""
        return any(process.poll() is None for process in self._processes)

    @property
    def outputs(self) -> list[str]:
        """What has been said so far."""
        logs = (self._folder / f"output-{n}.txt" for n in range(len(self._processes)))
        return [log.read_text(errors="replace") for log in logs]

    def finish(self, within_s: float, *, ranks_within_s: float | None = None) -> Ended:
        """Wait for the end on all hosts: of the ranks, if that is asked, and then of everything.

        Raises TimeoutError with what was said until then.
        """
        began = time.monotonic()
        if ranks_within_s is not None:
            self._wait(ranks_within_s, lambda: any(host.ranks() for host in self._hosts))
        ranks_s = time.monotonic() - began
        self._wait(within_s, self._is_there)
        codes = [process.wait() for process in self._processes]
        # For the table of docs/reliability.md (`pytest -s`).
        seconds = f"the ranks after {ranks_s:.1f} s, " if ranks_within_s is not None else ""
        print(
            f"{self._launcher}: {seconds}all after {time.monotonic() - began:.1f} s, with {codes}"
        )
        return Ended(codes, self.outputs)

    def _is_there(self) -> bool:
        return self.is_running or any(host.processes("launcher") for host in self._hosts)

    def _wait(self, within_s: float, is_there: Callable[[], bool]) -> None:
        began = time.monotonic()
        while is_there():
            if time.monotonic() > began + within_s:
                left = {host.name: host.processes("launcher") for host in self._hosts}
                said = "\n---\n".join(text[-4000:] for text in self.outputs)
                for host in self._hosts:
                    host.kill_all_processes()
                raise TimeoutError(f"still running after {within_s:.0f} s: {left}\n{said}")
            time.sleep(0.05)
