"""One thread (2 cores are shared, and sums keep their order) and a fixed seed for every test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from tests.sclcore import ranks
from tests.sclcore.sharded import CASES, Whole, kinds_of, network, run

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


Runs = Mapping[tuple[str, str, int], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def sharded_runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """(case, kind, world size) → what each rank came to. All in one launch: starting takes long."""
    folder = tmp_path_factory.mktemp("shards")
    ranks.launch("tests.sclcore.shard_worker", folder, world=3, timeout=280)
    wanted = [(name, *run) for name, case in CASES.items() for run in kinds_of(case)]
    wanted += [("refusals", "flat", 2), ("checkpoint", "fsdp", 2)]
    return {
        (name, kind, world): [
            torch.load(folder / f"out.{name}.{kind}.{world}.{rank}", weights_only=True)
            for rank in range(world)
        ]
        for name, kind, world in wanted
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
