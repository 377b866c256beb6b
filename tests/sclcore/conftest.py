"""One thread (2 cores are shared, and sums keep their order) and a fixed seed for every test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.sclcore import ranks
from tests.sclcore.sharded import ALL_RUNS, CASES, Whole, is_long, network, run

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process only."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


Runs = Mapping[tuple[str, str, int], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def sharded_runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """(case, kind, world size) → what each rank came to. All in one launch: starting takes long.

    For one file of tests: files are shared out to processes, and each would make all of them.
    """
    folder = tmp_path_factory.mktemp("shards")
    users = [i for i in request.session.items if "sharded_runs" in getattr(i, "fixturenames", ())]
    both_tiers = any(item.get_closest_marker("long") for item in users)
    wanted = [run for run in ALL_RUNS if both_tiers or not is_long(*run)]
    arguments = [":".join(map(str, run)) for run in wanted]
    ranks.launch("tests.sclcore.shard_worker", folder, *arguments, world=3, timeout=900)
    return {
        (name, kind, world): [
            torch.load(folder / f"out.{name}.{kind}.{world}.{rank}", weights_only=True)
            for rank in range(world)
        ]
        for name, kind, world in [*wanted, ("refusals", "flat", 2), ("checkpoint", "fsdp", 2)]
    }


@pytest.fixture(scope="session")
def whole_run() -> Callable[[str], dict[str, Any]]:
    """The same training in one process with whole state."""
    done: dict[str, dict[str, Any]] = {}

    def of(name: str) -> dict[str, Any]:
        if name not in done:
            case = CASES[name]
            done[name] = run(Whole(case, network(case), None))
        return done[name]

    return of
