"""DeepSpeed's launcher over ssh, from a hostfile: two names of this machine are the two nodes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launcher.conftest import ANEW, Start, finish, free_port, summary, wait_until

_SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
_SERVER = """
ListenAddress 127.0.0.1
Port {port}
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
    Port {port}
    IdentityFile {folder}/user_key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""


def missing() -> str | None:
    """Why there can be no ssh to this machine here, for the report of skipped tests."""
    absent = [name for name in ("ssh", "ssh-keygen", "pdsh", "unshare") if not shutil.which(name)]
    absent += [] if _SSHD else ["sshd"]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install openssh-server pdsh)"
    if os.geteuid() != 0:
        return "a private sshd needs root here: its folder /run/sshd is in a namespace"
    trial = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True)
    return f"no namespaces: {trial.stderr.strip()}" if trial.returncode else None


@pytest.fixture
def ssh_path(tmp_path: Path) -> Iterator[str]:
    """A PATH whose `ssh` reaches a private server on the loopback address, with its own keys."""
    if reason := missing():
        pytest.skip(reason)
    folder, port = tmp_path / "ssh", free_port()
    folder.mkdir()
    for name in ("host_key", "user_key"):
        make_key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(make_key, check=True)
    (folder / "server").write_text(_SERVER.format(folder=folder, port=port))
    (folder / "client").write_text(_CLIENT.format(folder=folder, port=port))
    (folder / "bin").mkdir()
    ssh = folder / "bin" / "ssh"
    # Both the launcher and pdsh call ssh by its name.
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/client "$@"\n')
    ssh.chmod(0o755)
    start = 'mount -t tmpfs none /run; mkdir /run/sshd; exec "$1" -D -e -f "$2"'
    command = ["unshare", "--mount", "sh", "-e", "-c", start, "sh", _SSHD, str(folder / "server")]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until(
            lambda: b"Server listening" in (folder / "log").read_bytes() or server.poll(),
            30,
            "sshd",
        )
        assert server.poll() is None, (folder / "log").read_text()
        yield f"{ssh.parent}{os.pathsep}{os.environ['PATH']}"
    finally:
        server.terminate()
        server.wait(timeout=30)


def test_two_nodes_of_a_hostfile_train_one_run(
    ssh_path: str, recipe: Path, tmp_path: Path, start: Start
) -> None:
    run_dir, hosts, variables = (tmp_path / name for name in ("run", "hosts", "variables"))
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    # Over ssh come no variables but those of this file.
    variables.write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hosts)]
    deepspeed += ["--no_local_rank", "--master_addr", "127.0.0.1", "--master_port", free_port()]
    script = ["launcher/train.py", "--recipe", str(recipe), "--set", f"run_dir={run_dir}"]
    deepspeed += [*script, "--set", "optim.epochs=2"]
    process = start(deepspeed, ANEW, PATH=ssh_path, DS_ENV_FILE=str(variables))
    code, output = finish(process)
    assert code == 0, output
    assert "127.0.0.1: " in output and "localhost: " in output, "pdsh names the node of a line"
    assert summary(run_dir)["world_size"] == 2
    [line] = (run_dir / "environment.jsonl").read_text().splitlines()
    assert json.loads(line)["started_by"] == "deepspeed"
