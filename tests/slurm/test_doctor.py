"""`scl doctor --cluster` on the nodes of a real Slurm, sound and not."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

from tests.slurm.cluster import Slurm, missing
from tests.slurm.jobs import DOCTOR, Submit


@pytest.mark.long
def test_sound_nodes(submit: Submit, tmp_path: Path) -> None:
    job = submit(script=DOCTOR)
    job.wait_end("COMPLETED")
    assert "2 of 2 rank(s) on 2 node(s), started by: srun; rendezvous at n0:" in job.log
    for node, rank in (("n0", "0"), ("n1", "1")):
        assert re.search(rf"│ {node} +│ {rank} +│ CPU, .*│ shared +│ [+-]0\.\d\d s", job.log), (
            job.log
        )
    assert re.search(r"all-reduce of 32 MiB: \d+\.\d\d GB/s", job.log)
    assert "nothing is wrong" in job.log
    assert not job.folder.exists(), "made for the check, and gone with it"


@pytest.mark.long
def test_a_node_with_other_data_packages_and_folders(digits: Path, tmp_path: Path) -> None:
    """A cluster of its own: what is mounted on one of its nodes is gone when it ends."""
    if reason := missing():
        pytest.skip(reason)
    empty, runs, metadata = (tmp_path / name for name in ("empty", "runs", "METADATA"))
    empty.mkdir()
    runs.mkdir()
    installed = importlib.metadata.distribution("timm")
    version = installed.version
    path = installed.locate_file(f"timm-{version}.dist-info/METADATA")
    assert isinstance(path, Path)
    metadata.write_text(path.read_text().replace(f"\nVersion: {version}\n", "\nVersion: 0.0.1\n"))
    with Slurm() as slurm, Submit(slurm, digits, tmp_path) as submit:
        slurm.mount("n1", "--bind", str(empty), str(digits))
        slurm.mount("n1", "--bind", str(metadata), str(path))
        slurm.mount("n1", "-t", "tmpfs", "none", str(runs))
        job = submit(script=DOCTOR, variables={"SCL_RUNS": str(runs)})
        fields = job.wait_end("FAILED")
        log = job.log
    assert fields["ExitCode"] == "1:0"
    problems = [line for line in log.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 3, log
    assert f"problem: n1 (rank 1): timm 0.0.1, others have {version}: let all nodes use" in log
    assert re.search(rf"problem: n1 \(rank 1\): .*{re.escape(str(digits))}", log), log
    assert "problem: n1 (rank 1): the run's folder is not the one that rank 0 writes to" in log
    assert "nothing is wrong" not in log
