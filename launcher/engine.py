"""Recipe → DeepSpeed engine: process group, device, precision, accumulation, clipping."""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import nn
from torch.optim import Optimizer

from data.stream.plan import BatchPlan
from launcher.cluster import rendezvous
from launcher.cluster.world import World
from launcher.errors import UsageError


class EngineConfig(BaseModel):
    """How it runs; only `precision` changes what is learned (and how batch norm sees the batch)."""

    model_config = ConfigDict(extra="forbid")

    ranks: int = Field(default=1, ge=1, description="processes `scl train` starts on this machine")
    precision: Literal["fp32", "autocast", "bf16"] = Field(
        default="fp32",
        description="autocast: bfloat16 arithmetic where it is safe; bf16: the model in bfloat16, "
        "latent weights and masks in float32",
    )
    zero_stage: Literal[0, 1, 2] = Field(
        default=0,
        description="what ranks share out: 0 nothing, 1 optimizer state, 2 gradients as well",
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
    step_timeout_s: int = Field(
        default=300,
        ge=0,
        description="seconds without progress (an update, a batch of evaluation, a checkpoint) "
        "after which all ranks print their stacks and the run ends; 0: never. Below timeout_s it "
        "can say which rank was behind",
    )
    compare_masks_every: int = Field(
        default=1000,
        ge=0,
        description="updates between comparisons of the masks of all ranks; 0: only when saving",
    )
    max_skipped_steps: int = Field(
        default=10, ge=1, description="updates in a row with a non-finite gradient that end the run"
    )

    @field_validator("precision", mode="before")
    @classmethod
    def _no_fp16(cls, value: object) -> object:
        if value == "fp16":
            raise ValueError(
                "fp16 needs loss scaling, whose skipped steps move the schedule but not the masks: "
                "should be fp32, autocast or bf16"
            )
        return value

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _no_stage_3(cls, value: object) -> object:
        if value == 3:
            raise ValueError(
                "stage 3 takes the parameters away between steps, and evaluation, batch norm and "
                "saving need them whole: should be 0, 1 or 2"
            )
        return value


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
    os.environ["DS_ACCELERATOR"] = accelerator()
    import deepspeed

    _quiet()
    torch.set_num_threads(config.threads)
    # Its shared-memory collectives are compiled at start-up (minutes) and training has no use for
    # them; the name is DeepSpeed's own list of operators that may be built.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]
    device = torch.device("cpu")
    if accelerator() == "cuda":
        device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=config.timeout_s)
    rendezvous.join(world, backend, device, timeout)
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False
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
    """A DeepSpeed engine around `model` and `optimizer`.

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
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {
            "enabled": config.precision == "autocast",
            "dtype": "bfloat16",
            # Stages 1 and 2 would send the gradients of these in bfloat16, stage 0 would not.
            "lower_precision_safe_modules": [],
        },
        "bf16": {"enabled": config.precision == "bf16"},
        # Batch norm wants its statistics in the precision of its input.
        "data_types": {"buffer_dtype": "bf16" if config.precision == "bf16" else None},
        "steps_per_print": 2**31,
    }
    with _no_step(optimizer):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


@contextlib.contextmanager
def _no_step(optimizer: Optimizer) -> Iterator[None]:
    """DeepSpeed's bf16 wrapper tries the optimizer out on gradients of 0: λ must not act then."""
    optimizer.step = lambda closure=None: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del optimizer.step


def apply_update(engine: Any) -> float:
    """The update at a boundary of accumulation, from the gradient averaged over all ranks.

    Returns the 2-norm of the gradient; where it is not finite, nothing was updated on any rank.
    """
    wrapper = engine.optimizer
    if wrapper is not engine.basic_optimizer:
        engine.step()
        return math.inf if wrapper.overflow else float(wrapper._global_grad_norm)
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(grads))
    if not math.isfinite(norm):
        # Without gradients an optimizer's step changes nothing.
        wrapper.zero_grad(set_to_none=True)
    engine.step()
    return norm


def _quiet() -> None:
    """Leave the terminal to what concerns the user; errors still come through."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|deepspeed)\..*")
