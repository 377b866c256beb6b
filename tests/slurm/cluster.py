"""A real Slurm of two nodes on this machine: its own ports, keys and state; no systemd.

Each node is a slurmd in its own namespaces with its own host name, so that to Slurm, and to its
jobs, it is another machine.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import psutil

from tests.ports import free_port

NODES = ("n0", "n1")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "sinfo", "scancel", "srun")
_NAMESPACES = ("--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
# What the job, rank or tracker around these tests would mean to the ones in them.
_FOREIGN = ("SLURM", "SBATCH", "SRUN", "SCL_", "WANDB_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_")
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

_CONF = """
ClusterName=scltest
SlurmctldHost={controller}
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
# A node may claim more cores than this machine has.
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
# Requeueing must be what the job asks for.
JobRequeue=0
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
KillWait=30
SlurmdTimeout={node_timeout_s}
InactiveLimit=0
MailProg=/bin/true
FirstJobId={first_job}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES PriorityTier=1 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 MaxTime=INFINITE State=UP
"""

T = TypeVar("T")


class SlurmError(Exception):
    """Slurm refused, or did not do in time what was waited for."""


def missing() -> str | None:
    """Why there can be no Slurm here, for the report of skipped tests; None if there can."""
    if os.geteuid() != 0:
        return "a test cluster needs root: its nodes are namespaces"
    absent = [name for name in (*_PROGRAMS, "unshare", "nsenter", "setpriv") if not _which(name)]
    if absent:
        return (
            f"not installed: {', '.join(absent)} (apt-get install --no-install-recommends "
            "slurmctld slurmd slurm-client munge)"
        )
    trial = subprocess.run(
        ["unshare", *_NAMESPACES, "mount", "--bind", "/etc/hosts", "/etc/hosts"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    return f"no namespaces: {trial.stderr.strip()}" if trial.returncode else None


class Slurm:
    """A running cluster, as a context: whatever happens inside, nothing of it stays.

    Its nodes claim `cpus` cores and `gpus` GPUs each; without GPUs the cluster has no such
    resource at all.
    """

    controller = "localhost"
    node_timeout_s = 60
    """After so long without an answer a node is down, and its jobs have failed."""

    def __init__(self, cpus: int = 4, gpus: int = 0) -> None:
        # Not below pytest's own folder: munged refuses parents that others may not enter, and the
        # path of a socket must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self._conf = self.folder / "slurm.conf"
        self._cpus, self._gpus = cpus, gpus
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

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
        try:
            wait_for(lambda: not self._kill_ours(), 30, "the end of everything below Slurm")
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def submit(
        self, script: Path, *options: str, cwd: Path, variables: Mapping[str, str] | None = None
    ) -> str:
        """`sbatch` from the folder `cwd`; returns the number of the job."""
        command = ("sbatch", "--parsable", *options, str(script))
        return self.call(*command, cwd=cwd, variables=variables).strip()

    def call(
        self, *command: str, cwd: Path | None = None, variables: Mapping[str, str] | None = None
    ) -> str:
        """Standard output of one of Slurm's commands. Raises SlurmError with what it said."""
        if not self._conf.exists():
            # Slurm's own commands try for a minute.
            raise SlurmError("this cluster is not up")
        folder = cwd or self.folder
        result = subprocess.run(
            self.at_controller(command, folder),
            cwd=folder,
            env=self._environment() | dict(variables or {}),
            capture_output=True,
            text=True,
            timeout=60,
        )
        if result.returncode:
            raise SlurmError(f"{' '.join(command)}: {result.stderr.strip()}")
        return result.stdout

    def address(self, node: str) -> str:
        """Where a node's slurmd listens."""
        return "127.0.0.1"

    def at_controller(self, command: Sequence[str], folder: Path) -> Sequence[str]:
        """What runs a command in `folder`, where the controller is."""
        return command

    def at_node(self, node: str, command: Sequence[str]) -> Sequence[str]:
        """What runs a command on a node, as long as the cluster lives."""
        begin = 'mount --bind "$1" /etc/hosts; hostname "$2"; shift 2; exec "$@"'
        shell = ("sh", "-e", "-c", begin, "sh", str(self.folder / "hosts"), node)
        return ("unshare", *_NAMESPACES, *shell, *command)

    def mount(self, node: str, *what: str) -> None:
        """`mount` with these arguments, for one node alone, until the cluster ends."""
        enter = ("nsenter", "--mount", "--target", str(self._nodes[node].pid))
        subprocess.run([*enter, "mount", *what], check=True, timeout=30)

    def show(self, what: str, name: str) -> dict[str, str]:
        """What Slurm knows of a "job" or "step", by the names that scontrol gives it."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.call("scontrol", "-o", "show", what, name)))

    def wait_end(self, job: str, timeout: float) -> dict[str, str]:
        """Wait until a job has ended, however; returns what Slurm knows of it."""

        def ended() -> dict[str, str] | None:
            fields = self.show("job", job)
            return fields if fields["JobState"] in _ENDED else None

        return wait_for(ended, timeout, f"job {job} to end")

    def wait_requeued(self, job: str, timeout: float) -> None:
        """Wait until a job is in the queue again, and spare it Slurm's two minutes there."""

        def pending() -> bool:
            fields = self.show("job", job)
            return fields["JobState"] == "PENDING" and fields["Restarts"] != "0"

        wait_for(pending, timeout, f"job {job} to be requeued")
        # At once, a node could take it for the run that has just ended, and refuse it: it tells
        # them apart by whole seconds.
        self.call("scontrol", "update", f"jobid={job}", "StartTime=now+2")

    def ranks(self, job: str) -> list[psutil.Process]:
        """The training processes of a job, on whatever node."""
        return [p for p in psutil.process_iter() if self._is_rank(p, job)]

    def _is_rank(self, process: psutil.Process, job: str) -> bool:
        try:
            # srun has the same command on its line, and is no task.
            if process.name() == "srun" or "launcher.train" not in process.cmdline():
                return False
            return self._is_ours(process) and process.environ().get("SLURM_JOB_ID") == job
        except psutil.Error:
            return False

    def _is_ours(self, process: psutil.Process) -> bool:
        # Another test run may have a cluster of its own on this machine.
        return process.environ().get("SLURM_CONF") == str(self._conf)

    def _kill_ours(self) -> bool:
        """Kill whatever was started below a daemon of ours; whether there was anything."""
        found = False
        for process in psutil.process_iter():
            try:
                if self._is_ours(process) and process.status() != psutil.STATUS_ZOMBIE:
                    process.kill()
                    found = True
            except psutil.Error:
                continue
        return found

    def _environment(self) -> dict[str, str]:
        ours = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
        return ours | {"SLURM_CONF": str(self._conf)}

    def _write_files(self) -> None:
        folder = self.folder
        folder.chmod(0o755)
        (folder / "state").mkdir()
        (folder / "plugstack.conf").touch()
        (folder / "hosts").write_text("".join(f"127.0.0.1 {n}\n" for n in ("localhost", *NODES)))
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        ctld_port, *ports = [free_port() for _ in range(1 + len(NODES))]
        conf = _CONF.format(
            folder=folder,
            ctld_port=ctld_port,
            controller=self.controller,
            node_timeout_s=self.node_timeout_s,
            # The port of a rendezvous follows from the job's number: keep two test runs apart.
            first_job=random.randrange(1, 9000),
        )
        resources = f"CPUs={self._cpus} RealMemory=1000"
        if self._gpus:
            conf += "GresTypes=gpu\n"
            resources += f" Gres=gpu:{self._gpus}"
            self._write_gpus()
        for node, port in zip(NODES, ports, strict=True):
            (folder / f"spool-{node}").mkdir()
            conf += f"NodeName={node} NodeHostname={node} NodeAddr={self.address(node)} "
            conf += f"Port={port} "
            conf += f"{resources}\n"
        self._conf.write_text(conf)

    def _write_gpus(self) -> None:
        # Any file is a GPU's device, as long as nothing is to be constrained by it.
        devices = self.folder / "gpu"
        for number in range(self._gpus):
            Path(f"{devices}{number}").touch()
        names = f"Name=gpu File={devices}[0-{self._gpus - 1}]\n"
        (self.folder / "gres.conf").write_text(names)

    def _start(self) -> None:
        munge = self.folder / "munge"
        munged = (
            *(_which("munged"), "--foreground", f"--key-file={munge}.key"),
            *(f"--socket={munge}.socket", f"--pid-file={munge}.pid", f"--seed-file={munge}.seed"),
        )
        self._spawn("munged", munged)
        self._wait_started(lambda: Path(f"{munge}.socket").exists(), "munged")
        slurmctld = (_which("slurmctld"), "-D", "-f", str(self._conf))
        self._spawn("slurmctld", self.at_controller(slurmctld, self.folder))
        for node in NODES:
            self._spawn_node(node)
        self._wait_started(self._nodes_are_idle, "the nodes to register")

    def _spawn_node(self, node: str) -> None:
        slurmd = (_which("slurmd"), "-D", "-f", str(self._conf), "-N", node)
        self._nodes[node] = self._spawn("slurmd", self.at_node(node, slurmd))

    def _spawn(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        log = self.folder / f"{len(self._daemons)}-{name}.log"
        with log.open("wb") as output:
            daemon = subprocess.Popen(
                # Where this process is killed and cannot clean up, they go with it.
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._daemons.append(daemon)
        return daemon

    def _nodes_are_idle(self) -> bool:
        try:
            lines = self.call("sinfo", "-h", "-N", "-t", "idle", "-o", "%N %v").splitlines()
        except SlurmError:
            return False
        # A node that has not registered yet has no version.
        return {line.split()[0] for line in lines if len(line.split()) == 2} >= set(NODES)

    def _wait_started(self, ready: Callable[[], bool], what: str) -> None:
        def check() -> bool:
            if any(daemon.poll() is not None for daemon in self._daemons):
                raise SlurmError("a daemon ended")
            return ready()

        try:
            wait_for(check, 60, what)
        except SlurmError as error:
            raise SlurmError(f"{error}\n{self._last_logs()}") from None

    def _last_logs(self) -> str:
        return "\n".join(
            "\n".join([f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-15:]])
            for path in sorted(self.folder.glob("*.log"))
        )


def wait_for(check: Callable[[], T | None], timeout: float, what: str) -> T:
    """Poll until `check` returns something true. Raises SlurmError when that takes too long."""
    deadline = time.monotonic() + timeout
    while not (result := check()):
        if time.monotonic() > deadline:
            raise SlurmError(f"waited {timeout:.0f} s in vain for {what}")
        time.sleep(0.2)
    return result


def _which(name: str) -> str:
    """Path of a program, also where PATH lacks the system's folders; '' if there is none."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    return shutil.which(name, path=path) or ""
