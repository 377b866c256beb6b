"""The order of tests, what was collected and left out, which test_tiers.py reads, and two hosts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.network.hosts import Hosts

# Two lanes share two cores, and sums keep their order. Read when torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"


@dataclass
class Collected:
    """Every test that was found, and those of them that are not run."""

    tests: dict[str, bool] = field(default_factory=dict)
    """Name → whether it is marked long."""
    files: set[Path] = field(default_factory=set)
    left_out: set[str] = field(default_factory=set)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Two hosts that know each other's names; skipped where there can be none."""
    from tests.network.hosts import Hosts, missing

    if reason := missing():
        pytest.skip(reason)
    with Hosts(tmp_path, "n0", "n1") as hosts:
        yield hosts


COLLECTED = pytest.StashKey[Collected]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COLLECTED] = Collected()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Slurm's tests mostly wait: begun first, they do so beside others that compute.
    items.sort(key=lambda item: "slurm" not in item.path.parts)
    collected = config.stash[COLLECTED]
    for item in items:
        collected.tests[item.nodeid] = item.get_closest_marker("long") is not None
        collected.files.add(item.path)


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        item.config.stash[COLLECTED].left_out.add(item.nodeid)
