"""Recipe → DeepSpeed engine: process group, device, precision, accumulation, clipping."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.optim import Optimizer

from data.plan import BatchPlan
from launcher.cluster import World
from launcher.errors import UsageError


class EngineConfig(BaseModel):
    """How it runs; only `precision` changes what is learned (and how batch norm sees the batch)."""

    model_config = ConfigDict(extra="forbid")

    ranks: int = Field(default=1, ge=1, description="processes `scl train` starts on this machine")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="bf16: autocast of forward and backward; weights and masks stay fp32",
    )
    max_micro_batch: int = Field(
        default=256,
        ge=1,
        description="samples a rank holds at a time; accumulation follows from it",
    )
    threads: int = Field(default=1, ge=1, description="CPU threads of each rank")
    timeout_s: int = Field(
        default=600, ge=10, description="a collective that takes longer ends the run"
    )
    max_skipped_steps: int = Field(
        default=10, ge=1, description="updates in a row with a non-finite gradient that end the run"
    )


def accumulation_steps(global_batch_size: int, world_size: int, max_micro_batch: int) -> int:
    """The fewest micro-batches per update that divide the batch evenly and fit `max_micro_batch`.

    Raises UsageError naming the nearest sizes that work when the ranks do not divide the batch.
    """
    per_rank, left = divmod(global_batch_size, world_size)
    if left or not per_rank:
        sizes = [n * world_size for n in (per_rank, per_rank + 1) if n]
        raise UsageError(
            f"optim.global_batch_size {global_batch_size} cannot be divided among {world_size} "
            f"ranks; the nearest possible: {' or '.join(map(str, sizes))}"
        )
    steps = -(-per_rank // max_micro_batch)
    while per_rank % steps:
        steps += 1
    return steps


def accelerator() -> Literal["cuda", "cpu"]:
    """What ranks run on: GPUs where there are any, unless DS_ACCELERATOR=cpu says otherwise."""
    asked = os.environ.get("DS_ACCELERATOR")
    return "cuda" if torch.cuda.is_available() and asked in (None, "cuda") else "cpu"


@contextlib.contextmanager
def process_group(world: World, config: EngineConfig) -> Iterator[torch.device]:
    """Join the run's processes through DeepSpeed; yields this rank's device."""
    _quiet()
    os.environ["DS_ACCELERATOR"] = accelerator()
    import deepspeed

    torch.set_num_threads(config.threads)
    # Its shared-memory collectives are compiled at start-up (minutes) and training has no use for
    # them; the name is DeepSpeed's own list of operators that may be built.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]
    device = torch.device("cpu")
    if accelerator() == "cuda":
        device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        timeout=datetime.timedelta(seconds=config.timeout_s),
        verbose=False,
    )
    # After an error there is nobody to meet at a barrier: the process just ends, and its closed
    # connections tell the others.
    yield device
    dist.barrier()
    dist.destroy_process_group()


def build_engine(
    model: nn.Module,
    optimizer: Optimizer,
    plan: BatchPlan,
    *,
    clip_grad_norm: float | None,
    config: EngineConfig,
) -> Any:
    """A DeepSpeed engine around `model` and `optimizer`, in stage 0: state is whole on each rank.

    DeepSpeed broadcasts the parameters of rank 0 here, and averages gradients at each boundary of
    accumulation, so that `optimizer.step()` sees those of the global batch.
    """
    import deepspeed

    settings = {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        # Left out, DeepSpeed clips at 1.0; 0 is no clipping.
        "gradient_clipping": clip_grad_norm or 0.0,
        "zero_optimization": {"stage": 0},
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 2**31,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def _quiet() -> None:
    """Leave the terminal to what concerns the user; errors still come through."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|deepspeed)\..*")
