"""Recipe → DeepSpeed engine: process group, device, precision, accumulation, clipping."""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from data.stream.plan import BatchPlan
from launcher.cluster import rendezvous
from launcher.cluster.accelerator import accelerator
from launcher.cluster.world import World
from launcher.recipe.engine import EngineConfig
from launcher.run import zero3
from launcher.terminal import Waiting


@contextlib.contextmanager
def process_group(world: World, config: EngineConfig) -> Iterator[torch.device]:
    """Join the run's processes through DeepSpeed; yields this rank's device."""
    os.environ["DS_ACCELERATOR"] = accelerator()
    with Waiting("importing DeepSpeed") if world.is_main else contextlib.nullcontext():
        import deepspeed

    _quiet()
    torch.set_num_threads(config.threads)
    # DeepSpeed's own list of operators that may be built. It would run a compiler to fill it, for a
    # second, and then another, for minutes, on shared-memory collectives. Training uses none.
    deepspeed.ops.__compatible_ops__ = {}  # type: ignore[attr-defined]
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
        "zero_optimization": {
            "stage": config.zero_stage,
            **(zero3.settings(model) if config.zero_stage == 3 else {}),
        },
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
    """Keep λ from acting while DeepSpeed's bf16 wrapper tries the optimizer on gradients of 0."""
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
        stage_3 = zero3.stage_3_of(engine)
        with contextlib.nullcontext() if stage_3 is None else zero3.lent(stage_3):
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
