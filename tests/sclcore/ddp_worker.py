"""One rank of test_distributed: `python -m tests.sclcore.ddp_worker RANK STORE OUT`."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sclcore import SCL, connection_groups
from tests.sclcore.nets import mlp, mlp_batches, mse_step

STEPS = 60
WORLDS = (2, 3)  # all in one launch, since starting is what takes time
GLOBAL_BATCH = 12  # divides by 1, 2 and 3


def global_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return mlp_batches(STEPS, size=GLOBAL_BATCH, dtype=torch.float64)


def make() -> tuple[nn.Module, SCL]:
    model = mlp(dtype=torch.float64)
    groups = connection_groups(model)
    return model, SCL(groups, lr=0.05, lam=0.1, mask_lr=0.02, weight_decay=1e-3)


def run(
    model: nn.Module, wrapped: nn.Module, optimizer: SCL, rank: int, world: int
) -> dict[str, Any]:
    """Train `wrapped` on this rank's share of each global batch; what came out."""
    share = GLOBAL_BATCH // world
    mine = slice(rank * share, (rank + 1) * share)
    hashes = []
    for x, y in global_batches():
        mse_step(wrapped, optimizer, (x[mine], y[mine]))
        hashes.append(optimizer.mask_hash())
    return {
        "model": model.state_dict(),
        "mask_variables": optimizer.mask_variables(),
        "hashes": hashes,
    }


def main() -> None:
    rank = int(sys.argv[1])
    store, out = sys.argv[2:4]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=max(WORLDS)
    )
    for world in WORLDS:
        group = dist.new_group(list(range(world)))
        if rank < world:
            model, optimizer = make()
            parallel = DistributedDataParallel(model, process_group=group)
            torch.save(run(model, parallel, optimizer, rank, world), f"{out}.{world}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
