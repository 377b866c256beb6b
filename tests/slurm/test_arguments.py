"""What the scripts make of their variables: the words that srun is given."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
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


def _run(
    commands: Path, script: str, folder: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run one of the scripts, with its arguments, in `folder` as in a job's first node."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SCL"))}
    path = f"{commands}:{os.environ['PATH']}"
    job = {"PATH": path, "SLURM_JOB_NODELIST": "n0", "SLURM_JOB_ID": "7", "SCL_VENV": sys.prefix}
    return subprocess.run(
        ["bash", *shlex.split(f"slurm/{script}")],
        cwd=folder,
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
    done = _run(commands, "ranks.sh train", SCL_ARGS=text, SCL_RUN="run")
    assert done.returncode == 0, done.stderr
    given = done.stdout.splitlines()
    given = given[given.index("run_dir=runs/run") + 1 :]
    assert given == words or [word for word in given if word != "--set"] == words


def test_an_open_quote_is_an_error(commands: Path) -> None:
    done = _run(commands, "ranks.sh train", SCL_RUN="run", SCL_ARGS="--set 'a=1")
    assert done.returncode == 2 and "SCL_ARGS has a quote that nothing closes" in done.stderr


def test_lambdas_on_several_lines(commands: Path) -> None:
    variables = {"SCL_LAMBDAS": "0.1\n0.2\n", "SLURM_ARRAY_TASK_ID": "1"}
    done = _run(commands, "sweep_lambda.sh", **variables)
    assert "method.lam=0.2" in done.stdout.splitlines(), done.stderr


def test_a_task_of_an_array_trains_any_run_of_a_sweep(commands: Path) -> None:
    variables = {"SCL_SWEEP": "recipes/paper/lambda.yaml", "SLURM_ARRAY_TASK_ID": "3"}
    done = _run(commands, "sweep.sh", SCL_RUNS="/runs", SLURM_NTASKS="8", **variables)
    program = ["-m", "launcher.cli", "sweep", "recipes/paper/lambda.yaml", "--task", "3"]
    given = done.stdout.splitlines()
    assert given[given.index("-m") :] == [
        *program,
        *("--runs", "/runs", "--set", "engine.ranks=8"),
    ], done.stderr
    done = _run(commands, "sweep.sh", SLURM_ARRAY_TASK_ID="3")
    assert done.returncode == 2 and "SCL_SWEEP is not set" in done.stderr


def test_the_setup_file_prepares_all_ranks(commands: Path, tmp_path: Path) -> None:
    """What it sets is there when srun is called, which hands it on; and it may set ours too."""
    setup = tmp_path / "cluster.sh"
    # Unset variables and commands that fail on the way are its own affair, as in conda's scripts.
    setup.write_text(
        'false; [ "$NOTHING" ]\nexport NCCL_SOCKET_IFNAME=ib0\n'
        f"SCL_VENV={sys.prefix}\nSCL_RUNS=/project/runs\n"
    )
    (commands / "srun").write_text('#!/bin/bash\necho "$NCCL_SOCKET_IFNAME" "$@"\n')
    done = _run(commands, "resnet50_scl.sh", SCL_SETUP=str(setup), SCL_VENV="none")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"ib0 --export=ALL --cpus-per-task=1 {sys.prefix}/bin/python3 ")
    assert "run_dir=/project/runs/scl-7" in done.stdout
    setup.write_text("false\n")
    for path in (setup, tmp_path / "none.sh"):
        done = _run(commands, "resnet50_scl.sh", SCL_SETUP=str(path))
        assert done.returncode == 2 and f"error: SCL_SETUP={path}" in done.stderr


def test_a_container_of_pyxis_is_asked_of_srun(commands: Path, tmp_path: Path) -> None:
    (commands / "srun").write_text(
        '#!/bin/bash\n[[ $1 == --help ]] && echo "  --container-image=…" || printf "%s\\n" "$@"\n'
    )
    data = tmp_path / "my data"
    data.mkdir()
    variables = {"SCL_PYXIS": "nvcr.io#nvidia/pytorch:26.01-py3", "SCL_DATA": str(data)}
    done = _run(commands, "resnet50_scl.sh", SCL_VENV="", **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2:8] == [
        f"--container-image={variables['SCL_PYXIS']}",
        f"--container-workdir={ROOT}",
        f"--container-mounts={ROOT}:{ROOT},{data}:{data}",
        *("python3", "-m", "launcher.train"),
    ]
    (commands / "srun").write_text("#!/bin/bash\necho usage\n")
    done = _run(commands, "resnet50_scl.sh", SCL_VENV="", **variables)
    assert done.returncode == 2 and "the plugin pyxis is not installed" in done.stderr
    done = _run(commands, "resnet50_scl.sh", SCL_CONTAINER="a.sif", **variables)
    assert done.returncode == 2 and "SCL_CONTAINER and SCL_PYXIS are both set" in done.stderr


def test_beside_no_checkout_the_installed_command_is_run(commands: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "scl").touch()
    for script, asked in (
        (
            "resnet50_scl.sh",
            "scl train --recipe recipes/resnet50_scl.yaml --set run_dir=runs/scl-7",
        ),
        ("doctor.sh", "scl doctor --recipe recipes/resnet50_scl.yaml"),
    ):
        done = _run(commands, script, tmp_path, SCL_VENV="env", SLURM_NTASKS="2")
        given = " ".join(done.stdout.splitlines())
        assert f"env/bin/{asked}" in given and "engine.ranks=2" in given, done.stderr
