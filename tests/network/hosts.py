"""Hosts that differ: each a set of namespaces with a name, an address and processes of its own.

What they share is the file system, as the nodes of a cluster do, and the wire between them, which
can be slow, lossy or cut. Nothing of them outlives the `with` block, or the process that made them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

_NAMESPACES = ("--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
_PROGRAMS = ("unshare", "nsenter", "setpriv", "ip", "bash", "mount", "hostname")
_NETWORK = "10.77.0"
# Process 1 of a host; bash reaps whatever is left to it.
_BEGIN = """
mount --bind "$1" /etc/hosts
hostname "$2"
ip link set lo up
echo up
while :; do sleep 1000 || true; done
"""
_SERVER = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
"""
_CLIENT = """
Host *
    IdentityFile {folder}/user_key
    IdentitiesOnly yes
    ServerAliveInterval 5
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""


def which(name: str) -> str | None:
    """Path of a program, also where PATH lacks the system's folders."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def missing(*programs: str) -> str | None:
    """Why there can be no hosts here, for the report of skipped tests; None if there can."""
    if os.geteuid() != 0:
        return "hosts of their own need root: they are namespaces"
    if absent := [name for name in (*_PROGRAMS, *programs) if not which(name)]:
        return f"not installed: {', '.join(absent)} (apt-get install iproute2 openssh-server pdsh)"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "no /dev/net/tun, from which the hosts' interfaces are made"
    trial = ["unshare", *_NAMESPACES, "mount", "--bind", "/etc/hosts", "/etc/hosts"]
    result = subprocess.run(trial, capture_output=True, text=True, timeout=30)
    return f"no namespaces: {result.stderr.strip()}" if result.returncode else None


class Host:
    """One of them; `pid` is its process 1, as it is numbered outside."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address = name, address
        self.etc_hosts = folder / f"hosts-{name}"
        self.etc_hosts.touch()
        log = (folder / f"host-{name}.log").open("wb")
        shell = ("bash", "-e", "-c", _BEGIN, "bash", str(self.etc_hosts), name)
        self._first = subprocess.Popen(
            # Where this process is killed and cannot clean up, they go with it.
            ["setpriv", "--pdeathsig", "KILL", "unshare", *_NAMESPACES, *shell],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        assert self._first.stdout is not None
        if self._first.stdout.readline() != b"up\n":
            raise RuntimeError(f"the host {name} did not come up")
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children")
        self.pid = int(children.read_text())

    def command(self, *words: str | Path, folder: Path | None = None) -> list[str]:
        """What runs a command in this host, in `folder` or the current one."""
        enter = ["nsenter", "--net", "--mount", "--uts", "--pid", "--target", str(self.pid)]
        return [*enter, f"--wd={folder or Path.cwd()}", "--", *map(str, words)]

    def run(self, *words: str | Path) -> str:
        """Run a command in this host; returns what it prints. Raises where it fails."""
        return subprocess.run(
            self.command(*words), check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def knows(self, names: Mapping[str, str]) -> None:
        """Let name → address be what /etc/hosts says in this host."""
        lines = [f"{address} {name}\n" for name, address in names.items()]
        # In place: what is mounted is this very file.
        self.etc_hosts.write_text("".join(["127.0.0.1 localhost\n", *lines]))

    def processes(self, word: str) -> list[str]:
        """The command lines in this host with `word` in them; those that have ended not."""
        lines = []
        for process in self._inside():
            with contextlib.suppress(psutil.Error):
                lines.append(" ".join(process.cmdline()))
        return [line for line in lines if word in line]

    def ranks(self) -> list[str]:
        """The names of the ranks in this host."""
        names = []
        for process in self._inside():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE:
                    names.append(process.name())
        return [name for name in names if name.startswith("scl-rank-")]

    def kill_all_processes(self) -> None:
        """Leave nothing but its first process."""
        for process in self._inside():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _inside(self) -> Iterator[psutil.Process]:
        ours = Path(f"/proc/{self.pid}/ns/pid").readlink()
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):
                space = Path(f"/proc/{process.pid}/ns/pid").readlink()
                if space == ours and process.pid != self.pid:
                    yield process

    def end(self) -> None:
        """Kill it: with its first process go all of its others, and its network."""
        if self._first.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        # unshare waits until the kernel has ended whatever was in there.
        self._first.wait(timeout=30)


class Hosts:
    """Hosts of these names, as a context; each knows all names. `folder` is for their files."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder, self._names = folder, names
        self._hosts: dict[str, Host] = {}
        self._wire: subprocess.Popen[str] | None = None
        self._services: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Hosts:
        try:
            self._begin()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            for host in self._hosts.values():
                host.end()
        finally:
            for process in (*self._services, *([self._wire] if self._wire else [])):
                process.kill()
                process.wait(timeout=30)

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts.values())

    def disturb(self, name: str, **line: Any) -> None:
        """Let the line of a host be so from now on; without arguments: as new. See wire.py."""
        assert self._wire is not None and self._wire.stdin is not None
        self._wire.stdin.write(json.dumps({name: line}) + "\n")
        self._wire.stdin.flush()
        self._hear_from_the_wire()

    def serve_ssh(self) -> str:
        """A private sshd in each host; returns a PATH whose `ssh` reaches them by name."""
        folder = self.folder / "ssh"
        (folder / "bin").mkdir(parents=True)
        for name in ("host_key", "user_key"):
            make_key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(make_key, check=True)
        (folder / "server").write_text(_SERVER.format(folder=folder))
        (folder / "client").write_text(_CLIENT.format(folder=folder))
        # Both DeepSpeed's launcher and pdsh call ssh by its name.
        ssh = folder / "bin" / "ssh"
        ssh.write_text(f'#!/bin/sh\nexec {which("ssh")} -F {folder}/client "$@"\n')
        ssh.chmod(0o755)
        for host in self:
            log = folder / f"{host.name}.log"
            host.run("mount", "-t", "tmpfs", "none", "/run")
            host.run("mkdir", "/run/sshd")
            self.serve(host, log, which("sshd") or "sshd", "-D", "-e", "-f", f"{folder}/server")
            wait_until(lambda log=log: "Server listening" in log.read_text(), 30, f"sshd: {log}")
        return f"{ssh.parent}{os.pathsep}{os.environ['PATH']}"

    def serve(self, host: Host, log: Path, *words: str | Path) -> None:
        """Run a program in a host as long as that lives."""
        with log.open("wb") as output:
            service = subprocess.Popen(
                host.command(*words), stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        self._services.append(service)

    def _begin(self) -> None:
        for number, name in enumerate(self._names, 1):
            self._hosts[name] = Host(name, f"{_NETWORK}.{number}", self.folder)
        self._wire = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", sys.executable, "-S", "-E"]
            + [str(Path(__file__).with_name("wire.py"))]
            + [f"{host.name}={host.pid}" for host in self],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._hear_from_the_wire()
        for host in self:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
            host.knows({other.name: other.address for other in self})

    def _hear_from_the_wire(self) -> None:
        assert self._wire is not None and self._wire.stdout is not None
        if self._wire.stdout.readline() != "done\n":
            raise RuntimeError("the wire between the hosts has ended")


def wait_until(condition: Any, timeout: float, what: str) -> None:
    """Wait until `condition()` is true. Raises TimeoutError."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:.0f} s in vain for {what}")
        time.sleep(0.02)
