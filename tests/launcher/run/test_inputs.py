"""Which order a run reads in, and which part of a batch is whose."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from data.stream.plan import MIXED, SPREAD
from launcher.checkpoints.checkpoint import Checkpoint
from launcher.cluster.ranks import places_by_host
from launcher.recipe.load import load_recipe
from launcher.run.inputs import open_inputs


def test_a_run_goes_on_in_the_order_it_began_with(recipe: Path) -> None:
    inputs = open_inputs(load_recipe(recipe), 2)

    def order(meta: dict[str, object]) -> int:
        return inputs.dealt(Checkpoint(Path(), 1, meta), [0, 1]).plan(0).order

    assert inputs.dealt(None, [0, 1]).plan(0).order == SPREAD
    assert order({"order": SPREAD}) == SPREAD
    # Checkpoints of before did not say.
    assert order({}) == MIXED


def test_the_ranks_of_a_host_read_side_by_side(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `srun --distribution=cyclic` numbers them; what the others say is made up here."""

    def gathered(hosts: list[str], own: str) -> None:
        assert own == socket.gethostname()
        hosts[:] = ["b", "a", "b", "a"]

    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "all_gather_object", gathered)
    places = places_by_host()
    assert places == [0, 2, 1, 3]
    inputs = open_inputs(load_recipe(recipe), 4).dealt(None, places)
    assert [inputs.plan(rank).rank for rank in range(4)] == places
