"""A reader killed at random positions: started again, it goes on with the same samples."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from data.shards.manifest import load_manifest
from data.stream import plan as plan_module
from data.stream.plan import BatchPlan
from tests import forkserver
from tests.data.killed_reader import BATCH, EPOCHS, KILLS, SEED, WINDOW, acknowledged

ROOT = Path(__file__).parents[3]


@pytest.mark.timeout(290)
def test_killed_at_random_positions_it_resumes_with_the_same_samples(
    packed_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = forkserver.run(
        [sys.executable, "-m", "tests.data.killed_reader", str(packed_digits), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("killed after") == len(KILLS) == 20
    monkeypatch.setattr(plan_module, "WINDOW", WINDOW)
    sizes = [shard.samples for shard in load_manifest(packed_digits / "train").shards]
    plan = BatchPlan(sizes, SEED, BATCH)
    steps = plan.steps_per_epoch
    lines = acknowledged(tmp_path / "killed")
    assert len(lines) == EPOCHS * steps
    for epoch in range(EPOCHS):
        read = [sample for line in lines if line[0] == epoch for sample in line[2:]]
        assert read == np.concatenate([*plan.micro_batches(epoch)]).tolist()
        assert len(set(read)) == steps * BATCH
    # The augmented pixels too are those of a reader that was never killed.
    assert acknowledged(tmp_path / "whole") == lines
