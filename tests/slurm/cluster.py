"""A real Slurm of two nodes on this machine: its own ports, keys and state; no systemd.

Each node is a slurmd in its own namespaces with its own host name, so that to Slurm, and to the
jobs, it is another machine.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import psutil

NODES = ("n0", "n1")
_DAEMONS = ("munged", "slurmctld", "slurmd")
_TOOLS = ("sbatch", "scontrol", "sinfo", "scancel", "srun", "unshare", "setpriv", "mount")
# What the caller's own job, rank or tracker would make of the cluster's.
_FOREIGN = ("SLURM", "SBATCH", "SRUN", "SCL_", "WANDB_", "RANK", "LOCAL_RANK", "WORLD_SIZE")
_FOREIGN += ("MASTER_",)
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

# The machine claims more than it has (config_overrides), so that the packaged script's own
# request, eight GPUs and twelve cores each, can be put to the test.
_CONF = """
ClusterName=scltest
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ctld_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
PlugStackConfig={folder}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
JobRequeue=1
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
# What a cluster leaves a job between SIGTERM and SIGKILL; 30 is Slurm's default.
KillWait=30
SlurmdTimeout=30
InactiveLimit=0
MailProg=/bin/true
FirstJobId={first_job}
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

T = TypeVar("T")


class SlurmError(Exception):
    """Slurm refused, or did not do in time what a test waited for."""


def missing() -> str | None:
    """Why there can be no Slurm here, as a sentence for a skipped test; None if there can."""
    if os.geteuid() != 0:
        return "a test cluster needs root: its nodes are namespaces of their own"
    absent = [name for name in (*_DAEMONS, *_TOOLS) if not _which(name)]
    if absent:
        return (
            f"no {', '.join(absent)}: apt-get install --no-install-recommends slurmctld slurmd "
            "slurm-client munge"
        )
    return None


class Slurm:
    """A running cluster. Use as a context: whatever happens inside, nothing of it stays."""

    def __init__(self) -> None:
        # Not below pytest's own folder: munged refuses parents that others may not enter, and a
        # socket's path may only be about 100 characters long.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        try:
            self._write_files()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # The nodes first: their namespaces take the jobs with them.
        for daemon in reversed(self._daemons):
            daemon.kill()
        for daemon in self._daemons:
            daemon.wait(timeout=30)
        shutil.rmtree(self.folder, ignore_errors=True)

    def submit(
        self, script: Path, *options: str, cwd: Path, variables: Mapping[str, str] | None = None
    ) -> str:
        """`sbatch` from `cwd`; returns the number of the job."""
        output = self.call(
            "sbatch", "--parsable", *options, str(script), cwd=cwd, variables=variables
        )
        return output.strip()

    def call(
        self, *command: str, cwd: Path | None = None, variables: Mapping[str, str] | None = None
    ) -> str:
        """Standard output of one of Slurm's commands. Raises SlurmError with what it said."""
        result = subprocess.run(
            command,
            cwd=cwd or self.folder,
            env=self._environment() | dict(variables or {}),
            capture_output=True,
            text=True,
            timeout=60,
        )
        if result.returncode:
            raise SlurmError(f"{' '.join(command)}: {result.stderr.strip()}")
        return result.stdout

    def show(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job, by the names of `scontrol show job`."""
        line = self.call("scontrol", "-o", "show", "job", job)
        return dict(re.findall(r"(\S+?)=(\S*)", line))

    def wait_end(self, job: str, timeout: float) -> dict[str, str]:
        """Wait until the job has ended, however; returns what Slurm knows of it."""

        def ended() -> dict[str, str] | None:
            fields = self.show(job)
            return fields if fields["JobState"] in _ENDED else None

        return wait_for(ended, timeout, f"the end of job {job}")

    def ranks(self, job: str) -> list[psutil.Process]:
        """The training processes of a job, on whatever node."""
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if "launcher.train" in (process.info["cmdline"] or []) and self._is_rank(process, job)
        ]

    def logs(self) -> str:
        """The last lines of every daemon's log, for a message about a failed start."""
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(self.folder.glob("*.log"))
        )

    def _is_rank(self, process: psutil.Process, job: str) -> bool:
        try:
            environment = process.environ()
        except psutil.Error:
            return False
        # srun has the command on its line as well, but is no task; another cluster may run here.
        return (
            environment.get("SLURM_JOB_ID") == job
            and environment.get("SLURM_CONF") == str(self.folder / "slurm.conf")
            and "SLURM_PROCID" in environment
            and process.name() != "srun"
        )

    def _environment(self) -> dict[str, str]:
        ours = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
        return ours | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def _write_files(self) -> None:
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        for node in NODES:
            (self.folder / f"spool-{node}").mkdir()
        ctld_port, *ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={port} CPUs=96 "
            "RealMemory=4000 Gres=gpu:8"
            for node, port in zip(NODES, ports, strict=True)
        )
        conf = _CONF.format(
            folder=self.folder,
            ctld_port=ctld_port,
            nodes=nodes,
            # The rendezvous port follows from the job's number: keep two test runs apart.
            first_job=random.randrange(1, 9000),
        )
        (self.folder / "slurm.conf").write_text(conf)
        # Slurm takes any file for a GPU's device, as long as nothing is to be constrained by it.
        devices = [self.folder / f"gpu{number}" for number in range(8)]
        for device in devices:
            device.touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        (self.folder / "plugstack.conf").touch()
        names = "".join(f"127.0.0.1 {node}\n" for node in ("localhost", *NODES))
        (self.folder / "hosts").write_text(names)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)

    def _start(self) -> None:
        munge = self.folder / "munge"
        self._spawn(
            "munged",
            "--foreground",
            f"--key-file={munge}.key",
            f"--socket={munge}.socket",
            f"--log-file={munge}.log",
            f"--pid-file={munge}.pid",
            f"--seed-file={munge}.seed",
        )
        self._wait_started(lambda: (self.folder / "munge.socket").exists(), "munged")
        conf = str(self.folder / "slurm.conf")
        self._spawn("slurmctld", "-D", "-f", conf)
        for node in NODES:
            self._spawn_node(node, conf)
        self._wait_started(self._nodes_are_idle, "the nodes")

    def _spawn_node(self, node: str, conf: str) -> None:
        self._spawn(
            "unshare",
            *("--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"),
            *("sh", "-c"),
            'mount --bind "$1" /etc/hosts && hostname "$2" && exec "$3" -D -f "$4" -N "$2"',
            *("sh", str(self.folder / "hosts"), node, _which("slurmd"), conf),
        )

    def _spawn(self, program: str, *arguments: str) -> None:
        with (self.folder / f"{program}-{len(self._daemons)}.output.log").open("wb") as output:
            daemon = subprocess.Popen(
                # When this process is killed, so that it cannot clean up, they go with it.
                ["setpriv", "--pdeathsig", "KILL", _which(program), *arguments],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._daemons.append(daemon)

    def _nodes_are_idle(self) -> bool:
        # A node that has not registered yet has no version.
        lines = self.call("sinfo", "-h", "-N", "-t", "idle", "-o", "%N %v").splitlines()
        return {line.split()[0] for line in lines if len(line.split()) == 2} >= set(NODES)

    def _wait_started(self, ready: Callable[[], bool], what: str) -> None:
        def check() -> bool:
            dead = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if dead:
                raise SlurmError(f"{dead} ended\n{self.logs()}")
            try:
                return ready()
            except SlurmError:
                return False

        try:
            wait_for(check, 60, what)
        except SlurmError as error:
            raise SlurmError(f"{error}\n{self.logs()}") from None


def wait_for(check: Callable[[], T | None], timeout: float, what: str) -> T:
    """Poll until `check` returns something true. Raises SlurmError when that takes too long."""
    deadline = time.monotonic() + timeout
    while True:
        if result := check():
            return result
        if time.monotonic() > deadline:
            raise SlurmError(f"waited {timeout:.0f} s in vain for {what}")
        time.sleep(0.2)


def _which(name: str) -> str:
    """Path of a program, also where the user's path lacks the system's folders; '' if none."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    return shutil.which(name, path=path) or ""


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
