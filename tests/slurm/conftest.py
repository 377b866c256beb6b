"""One cluster, one set of shards and one undisturbed job for all tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import forkserver
from tests.slurm.cluster import Slurm, missing
from tests.slurm.jobs import ROOT, Submit, Submitted


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A running cluster of two nodes without GPUs."""
    if reason := missing():
        pytest.skip(reason)
    with Slurm() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, packed."""
    folder = tmp_path_factory.mktemp("digits")
    command = [sys.executable, "-m", "launcher.cli", "pack", "digits", "--out", str(folder)]
    forkserver.run([*command, "--workers", "1"], cwd=ROOT, check=True, timeout=120)
    return folder


@pytest.fixture(scope="session")
def undisturbed(
    slurm: Slurm, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Submitted]:
    """A job that was let run to its end."""
    with Submit(slurm, digits, tmp_path_factory.mktemp("undisturbed")) as submit:
        # Submitted by a rank of something else, whose place in the world is not to be inherited.
        job = submit(variables={"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
        job.wait_end("COMPLETED")
        yield job


@pytest.fixture
def submit(slurm: Slurm, digits: Path, tmp_path: Path) -> Iterator[Submit]:
    """Submits the packaged script on two nodes; runs and logs come into the test's own folder."""
    with Submit(slurm, digits, tmp_path) as submit:
        yield submit
