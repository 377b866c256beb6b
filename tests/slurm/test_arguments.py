"""What the scripts make of their variables: the words that srun is given."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.slurm.jobs import ROOT


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """In the place of Slurm's: its srun prints each of its arguments on a line."""
    for name, body in (("srun", "printf '%s\\n' \"$@\""), ("scontrol", "echo n0")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def _run(commands: Path, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SCL"))}
    path = f"{commands}:{os.environ['PATH']}"
    job = {"PATH": path, "SLURM_JOB_NODELIST": "n0", "SLURM_JOB_ID": "7"}
    return subprocess.run(
        ["bash", f"slurm/{script}", *(["-m", "launcher.train"] if script == "ranks.sh" else [])],
        cwd=ROOT,
        env=kept | job | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("--set a=1 --set b=2", ["--set", "a=1", "--set", "b=2"]),
        ("--set a=1\n  --set\tb=2\n", ["--set", "a=1", "--set", "b=2"]),
        ("--set 'data.path=/my data' --set \"c={d: 1}\"", ["data.path=/my data", "c={d: 1}"]),
    ],
)
def test_all_of_scl_args_arrives(commands: Path, text: str, words: list[str]) -> None:
    done = _run(commands, "ranks.sh", SCL_ARGS=text)
    assert done.returncode == 0, done.stderr
    given = done.stdout.splitlines()
    given = given[given.index("--recipe") + 2 :]
    assert given == words or [word for word in given if word != "--set"] == words


def test_an_open_quote_is_an_error(commands: Path) -> None:
    done = _run(commands, "ranks.sh", SCL_ARGS="--set 'a=1")
    assert done.returncode == 2 and "SCL_ARGS has a quote that nothing closes" in done.stderr


def test_lambdas_on_several_lines(commands: Path) -> None:
    variables = {"SCL_LAMBDAS": "0.1\n0.2\n", "SLURM_ARRAY_TASK_ID": "1"}
    done = _run(commands, "sweep_lambda.sh", **variables)
    assert "method.lam=0.2" in done.stdout.splitlines(), done.stderr
