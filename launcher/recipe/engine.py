"""The `engine:` section of a recipe: how a run is computed, and by how many."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

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
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=0,
        description="what ranks share out: 0 nothing, 1 optimizer state, 2 gradients as well, "
        "3 weights as well, which are put together layer by layer",
    )
    channels_last: bool = Field(
        default=False,
        description="lay convolutions out with channels last, as GPUs want them in half precision",
    )
    compile: Literal["off", "default", "max-autotune"] = Field(
        default="off",
        description="torch.compile of the model; max-autotune: try kernels out, for minutes",
    )
    autotune: bool = Field(
        default=False,
        description="let cuDNN try its algorithms out and take the fastest (CUDA); another start "
        "may take others, which round differently",
    )
    tf32: bool = Field(
        default=False, description="compute float32 products in TF32 (CUDA): faster, 10 bits"
    )
    recompute: bool = Field(
        default=False,
        description="compute activations again in the backward pass instead of keeping them "
        "(gradient checkpointing): less memory, a third more arithmetic",
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
