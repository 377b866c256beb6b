"""DeepSpeed's launcher over ssh, from a hostfile, between two hosts that share their files only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launcher.conftest import Start, finish, summary, train
from tests.network.hosts import Hosts, missing
from tests.network.launchers import Run

EPOCHS = "optim.epochs=2"


def test_two_hosts_of_a_hostfile_train_one_run(recipe: Path, tmp_path: Path, start: Start) -> None:
    if reason := missing("ssh", "sshd", "ssh-keygen", "pdsh"):
        pytest.skip(reason)
    run_dir, alone = tmp_path / "run", tmp_path / "alone"
    arguments = ["--recipe", recipe, "--set", f"run_dir={run_dir}", EPOCHS]
    with Hosts(tmp_path, "n0", "n1") as hosts:
        run = Run(hosts, "deepspeed", arguments, ssh_path=hosts.serve_ssh())
        code, said = finish(start(train(recipe, alone, EPOCHS)))
        assert code == 0, said
        [code], [output] = run.finish(within_s=200)
    assert code == 0, output
    assert "n0: " in output and "n1: " in output, "pdsh names the node of a line"
    assert summary(run_dir)["world_size"] == 2
    [line] = (run_dir / "environment.jsonl").read_text().splitlines()
    assert json.loads(line)["started_by"] == "deepspeed"
    of_two, of_one = ((run / "model.safetensors").read_bytes() for run in (run_dir, alone))
    assert of_two == of_one, "two hosts of one rank, and one of two, are one network"
