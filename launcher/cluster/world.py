"""Who am I: a rank of deepspeed, torchrun, srun or of somebody's own, or a process by itself."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

from launcher.errors import UsageError

# What only one launcher sets, beside the variables of a rank that all of them set.
_LAUNCHERS = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_RANK": "deepspeed"}


@dataclass(frozen=True)
class World:
    """This process among all of a run. `source` names who started it."""

    rank: int
    local_rank: int
    world_size: int
    master_addr: str
    master_port: int
    source: str
    listening: socket.socket | None = field(default=None, compare=False, repr=False)
    """Where rank 0 of `scl train` listens already: at a port that nobody else can have taken."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def is_rank_of(self, ranks: int) -> bool:
        """Whether this process is a rank that somebody has started, where `ranks` are asked for.

        The shell of `srun --pty` has the variables of a step of one task, and so has whatever is
        started in it: who asks for more ranks there means ranks of this machine.
        """
        return self.source != "single process" and (self.world_size > 1 or ranks == 1)

    def export(self) -> None:
        """Set the five variables from which every library reads the world."""
        os.environ.update(
            RANK=str(self.rank),
            LOCAL_RANK=str(self.local_rank),
            WORLD_SIZE=str(self.world_size),
            MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port),
        )


def find_world(environment: Mapping[str, str] | None = None) -> World:
    """The world from the environment: RANK … first, then a Slurm step's variables, else one rank.

    A batch script under Slurm is not a rank of it: only `srun` sets the variables of a step.
    Raises UsageError when the variables are there but incomplete or no numbers.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env and "WORLD_SIZE" in env:
        return World(
            rank=_number(env, "RANK"),
            local_rank=_number(env, "LOCAL_RANK", default=0),
            world_size=_number(env, "WORLD_SIZE"),
            master_addr=env.get("MASTER_ADDR", "127.0.0.1"),
            master_port=_number(env, "MASTER_PORT", default=29500),
            source=_launcher_of(env),
        )
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        return World(
            rank=_number(env, "SLURM_PROCID"),
            local_rank=_number(env, "SLURM_LOCALID"),
            world_size=_number(env, "SLURM_STEP_NUM_TASKS"),
            master_addr=env.get("MASTER_ADDR") or _first_host(env),
            master_port=_number(
                env, "MASTER_PORT", default=20000 + _number(env, "SLURM_JOB_ID") % 10000
            ),
            source="srun",
        )
    address = env.get("MASTER_ADDR", "127.0.0.1")
    port = _number(env, "MASTER_PORT", default=free_port())
    return World(0, 0, 1, address, port, source="single process")


def attempt() -> str:
    """Which start of its ranks this is to torchrun, whose store outlives them."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def free_port() -> int:
    """A TCP port that is free on the loopback address now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _launcher_of(env: Mapping[str, str]) -> str:
    """Who started a rank that has RANK and WORLD_SIZE; `by hand` where no launcher shows."""
    return next((name for variable, name in _LAUNCHERS.items() if variable in env), "by hand")


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = env.get(name, None if default is None else str(default))
    try:
        return int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UsageError(
            f"the environment variable {name} should hold a number and holds {value!r}: start "
            "ranks with `scl train`, deepspeed, torchrun or srun, which set it"
        ) from None


def _first_host(env: Mapping[str, str]) -> str:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return output.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise UsageError(
            f"cannot tell the first host of the Slurm nodes {nodes!r} ({error}): set MASTER_ADDR "
            "in the batch script, as slurm/resnet50_scl.sh does"
        ) from error
