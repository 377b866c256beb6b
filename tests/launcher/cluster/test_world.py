"""Who am I, from the environment that each launcher leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher import train
from launcher.cluster.world import World, find_world
from launcher.errors import UsageError

STEP = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_JOB_ID": "123456",
    "MASTER_ADDR": "node0",
}


@pytest.mark.parametrize(
    ("variables", "source"),
    [
        # As their launchers leave them: deepspeed 0.19, torchrun 2.11.
        ({"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "4"}, "deepspeed"),
        ({"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}, "torchrun"),
        ({}, "by hand"),
    ],
)
def test_ranks_of_a_launcher(variables: dict[str, str], source: str) -> None:
    env = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a"}
    world = find_world(env | variables | {"MASTER_PORT": "7"})
    assert world == World(3, 1, 4, "a", 7, source)


def test_ranks_of_srun() -> None:
    assert find_world(STEP) == World(5, 1, 8, "node0", 23456, "srun")
    assert find_world(STEP | {"MASTER_PORT": "9"}).master_port == 9


def test_a_batch_script_is_not_a_rank() -> None:
    env = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}
    world = find_world(env)
    assert (world.world_size, world.source) == (1, "single process")


def test_the_environment_of_a_rank_wins_over_slurms() -> None:
    assert find_world(STEP | {"RANK": "0", "WORLD_SIZE": "2"}).world_size == 2


def test_a_shell_inside_a_step_is_no_rank_where_more_are_asked_for() -> None:
    """As `srun --pty bash` leaves it, also to whatever is started there later."""
    shell = STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert find_world(shell).is_rank_of(1) and not find_world(shell).is_rank_of(2)
    assert find_world(STEP).is_rank_of(1) and find_world(STEP).is_rank_of(2)
    assert not find_world({}).is_rank_of(1)


def test_alone() -> None:
    world = find_world({})
    assert (world.rank, world.world_size, world.is_main) == (0, 1, True)
    assert world.master_port > 0


def test_alone_where_the_user_says() -> None:
    world = find_world({"MASTER_ADDR": "127.0.0.2", "MASTER_PORT": "4711"})
    assert (world.master_addr, world.master_port) == ("127.0.0.2", 4711)


def test_a_variable_that_is_no_number() -> None:
    with pytest.raises(UsageError, match="RANK should hold a number and holds 'x'"):
        find_world({"RANK": "x", "WORLD_SIZE": "2"})


def test_a_rank_ends_with_such_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main(["--recipe", "recipes/digits_scl.yaml"]) == 2
    assert "RANK should hold a number" in capsys.readouterr().err


def test_slurm_without_scontrol(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    env = {key: value for key, value in STEP.items() if key != "MASTER_ADDR"}
    with pytest.raises(UsageError, match="set MASTER_ADDR in the batch script"):
        find_world(env | {"SLURM_JOB_NODELIST": "n[0-1]"})


def test_export_sets_the_five_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "before")
    world = World(1, 0, 2, "host", 1234, "srun")
    world.export()
    assert find_world(os.environ) == World(1, 0, 2, "host", 1234, "by hand")
