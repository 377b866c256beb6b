"""FSDP2 in a plain PyTorch loop; its trainings on several ranks are in test_shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as ShardedAlong
from torch.distributed.tensor.placement_types import Placement

from sclcore import SCL, connection_groups
from tests.sclcore.nets import mlp, mlp_batches, mse_step


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process only."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _on(mesh: DeviceMesh, *placements: Placement) -> list[dict[str, Any]]:
    layer = nn.Linear(8, 4, bias=False)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, placements))
    return connection_groups(layer)


@pytest.mark.usefixtures("alone")
def test_hybrid_sharding_is_refused() -> None:
    mesh = init_device_mesh("cpu", (1, 1))
    with pytest.raises(ValueError, match=r"weight is distributed as .* 2 dim") as error:
        SCL(_on(mesh, Replicate(), ShardedAlong(0)), lr=0.1, lam=0.1)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("placement", [Replicate(), ShardedAlong(1)])
def test_other_placements_are_refused(placement: Placement) -> None:
    mesh = init_device_mesh("cpu", (1,))
    with pytest.raises(ValueError, match="FSDP2's sharding along dimension 0"):
        SCL(_on(mesh, placement), lr=0.1, lam=0.1)


@pytest.mark.usefixtures("alone")
def test_sharded_and_whole_tensors_in_one_group_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"mixes sharded tensors \(0.weight\) and whole") as error:
        SCL(connection_groups(model), lr=0.1, lam=0.1)
    assert "fully_shard to the whole model" in str(error.value)


@pytest.mark.usefixtures("alone")
def test_state_is_sharded_like_the_parameters() -> None:
    model = mlp()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = SCL(connection_groups(model), lr=0.1, lam=0.1)
    mse_step(model, optimizer, mlp_batches(1)[0])
    [group] = [g for g in optimizer.param_groups if g["connections"]]
    for p in group["params"]:
        state = optimizer.state_dict()["state"][0]
        assert sorted(state) == ["mask", "mask_momentum_buffer", "momentum_buffer", "weight"]
        for value in optimizer.state[p].values():
            assert isinstance(value, DTensor)
            assert (value.placements, value.shape) == (p.placements, p.shape)
