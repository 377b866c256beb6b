"""Slurm's nodes as hosts of a network of their own, and what is done to that."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.network import hosts
from tests.slurm import cluster
from tests.slurm.cluster import wait_for
from tests.slurm.jobs import PATIENCE_S, Submit, Submitted
from tests.slurm.networked import NetworkedSlurm

pytestmark = pytest.mark.long

STEP_TIMEOUT_S, TIMEOUT_S = 25, 60
SETTINGS = (
    f"--set engine.step_timeout_s={STEP_TIMEOUT_S} --set engine.timeout_s={TIMEOUT_S} "
    "--set checkpoint.every_steps=10"
)


@pytest.fixture
def networked(tmp_path: Path) -> Iterator[NetworkedSlurm]:
    """A running cluster: the hosts head, n0 and n1."""
    if reason := hosts.missing() or cluster.missing():
        pytest.skip(reason)
    folder = tmp_path / "hosts"
    folder.mkdir()
    with NetworkedSlurm(folder) as slurm:
        yield slurm


@pytest.fixture
def submit(networked: NetworkedSlurm, digits: Path, tmp_path: Path) -> Iterator[Submit]:
    """Submits the packaged script there."""
    with Submit(networked, digits, tmp_path) as submit:
        yield submit


@pytest.mark.timeout(500)
def test_nodes_whose_own_name_leads_to_themselves(
    networked: NetworkedSlurm, submit: Submit, undisturbed: Submitted
) -> None:
    """As Debian has it in /etc/hosts."""
    names = {host.name: host.address for host in networked.hosts}
    for host in networked.hosts:
        host.knows(names | {host.name: "127.0.1.1"})
    job = submit()
    job.wait_end("COMPLETED")
    assert job.starts[0]["world_size"] == 2
    assert job.weights == undisturbed.weights


@pytest.mark.timeout(900)
def test_a_node_that_is_lost_and_comes_back(
    networked: NetworkedSlurm, submit: Submit, undisturbed: Submitted
) -> None:
    job = submit(more=SETTINGS)
    latest = job.folder / "checkpoints" / "latest"
    wait_for(latest.exists, PATIENCE_S, "the first checkpoint")
    networked.hosts.disturb("n1", cut=True)
    began = time.monotonic()
    wait_for(lambda: not networked.ranks(job.number), TIMEOUT_S + 15, "the ranks to end")
    print(f"Slurm: all ranks ended after {time.monotonic() - began:.1f} s")
    assert "nothing went on for 25 s: rank 1 did not answer" in job.log, job.log
    networked.hosts.disturb("n1")
    # The rank that noticed has failed, and the job with it, before Slurm gives the node up.
    job.wait_end("FAILED", timeout=2 * PATIENCE_S)
    networked.call("scontrol", "requeue", job.number)
    networked.wait_requeued(job.number, PATIENCE_S)
    job.wait_end("COMPLETED", timeout=2 * PATIENCE_S)
    assert "continues at step" in job.log
    assert job.summary["mask_hash"] == undisturbed.summary["mask_hash"]
    assert job.weights == undisturbed.weights
