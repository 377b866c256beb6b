"""What a rank trains with: recipe → model, optimizer, DeepSpeed engine, batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from data.augmentation.mixing import mix, mixed_targets
from data.shards.manifest import Manifest
from data.stream.pipeline import ShardDataset, normalise, train_stream
from data.stream.plan import BatchPlan
from launcher.checkpoints.optimizer_state import OptimizerState, parameter_names
from launcher.cluster.ranks import average_batch_norm, sum_over_ranks
from launcher.cluster.world import World
from launcher.engine import build_engine
from launcher.evaluate import evaluate
from launcher.init import FirstState, Initial, first_masks, hash_weights, initial_model, share
from launcher.preflight import Inputs
from launcher.recipe import Recipe
from launcher.target import controller_of
from sclcore import Scheduler
from sclcore.connections import find_connections
from sclcore.controller import TargetController
from sclcore.kernels import find_kernel
from sclcore.sparse import SparseOptimizer


@dataclass(frozen=True)
class Session:
    """Everything of a run but its progress."""

    recipe: Recipe
    world: World
    device: torch.device
    train_set: ShardDataset
    val_set: ShardDataset
    plan: BatchPlan
    model: nn.Module
    optimizer: Optimizer
    optimizer_state: OptimizerState
    scheduler: Scheduler
    controller: TargetController | None
    engine: Any
    loss_function: nn.Module
    initial_weights_hash: str | None = None
    """Of the weights that a new run starts from, before any mask; None where it continues."""

    @property
    def manifest(self) -> Manifest:
        return self.train_set.manifest

    @property
    def total_steps(self) -> int:
        return self.plan.steps_per_epoch * self.recipe.optim.epochs

    def batches(self, step: int) -> Iterator[dict[str, Tensor]]:
        """This rank's micro-batches from update `step` to the end of the run."""
        epoch, start_step = divmod(step, self.plan.steps_per_epoch)
        return train_stream(
            self.train_set,
            self.plan,
            self.recipe.data,
            start_epoch=epoch,
            start_step=start_step,
            epochs=self.recipe.optim.epochs,
        )

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits [batch, classes] in float32."""
        images = normalise(batch["image"], self.manifest.image)
        if self.recipe.data.mixing:
            images = mix(images, batch)
        return self.network(images)

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross entropy; where samples are mixed, with their labels mixed likewise."""
        labels = batch["label"]
        if self.recipe.data.mixing:
            labels = mixed_targets(batch, logits.shape[1])
        return self.loss_function(logits, labels)

    def network(self, images: Tensor) -> Tensor:
        """Logits [batch, classes] in float32, of normalised images."""
        dtype = next(self.model.parameters()).dtype
        return self.engine(images.to(dtype)).float()

    def evaluate(self, on_batch: Callable[[], None]) -> dict[str, float]:
        """Results on the validation split, with the statistics of all ranks. Collective."""
        average_batch_norm(self.model)
        self.engine.eval()
        return evaluate(
            self.network,
            self.val_set,
            self.recipe.data,
            device=self.device,
            rank=self.world.rank,
            world_size=self.world.world_size,
            on_batch=on_batch,
        )

    def count_connections(self) -> tuple[int, int]:
        """How many connections are live, and how many there are. Collective."""
        if isinstance(self.optimizer, SparseOptimizer):
            live = self.optimizer.live_connections().values()
            return sum(live), sum(self.optimizer.connection_sizes().values())
        total = sum(c.parameter.numel() for c in find_connections(self.model))
        return total, total

    def masks_are_final(self, step: int) -> bool:
        """Whether the network after update `step` has the connections it will end with."""
        recipe = self.recipe
        return recipe.method.masks_are_final(recipe.schedule, step, self.total_steps)


def build_session(
    recipe: Recipe,
    inputs: Inputs,
    world: World,
    device: torch.device,
    initial: Initial | None = None,
) -> Session:
    """Build model, optimizer and engine; the same initial weights on every rank. Collective.

    `initial` is what a new run starts from, whole on rank 0; None for one that continues.
    """
    agree_on_fused_steps(device)
    plan = inputs.plan(recipe, world.world_size, world.rank)
    channels, size = inputs.manifest.image.channels, recipe.data.image_size
    model = initial_model(recipe, inputs.manifest, initial or Initial()).to(device)
    if initial is not None:
        share(model)
    initial_hash = hash_weights(model) if initial is not None and world.is_main else None
    example = torch.empty(1, channels, size, size)
    optimizer = recipe.method.optimizer(model, recipe.optim, example)
    scheduler = Scheduler(optimizer, recipe.schedule)
    total_steps = plan.steps_per_epoch * recipe.optim.epochs
    controller = controller_of(recipe, model, optimizer, example, total_steps)
    names = parameter_names(model, optimizer)
    masks = first_masks(optimizer, recipe.init, initial) if initial is not None else {}
    engine = build_engine(
        model,
        optimizer,
        plan,
        clip_grad_norm=recipe.optim.clip_grad_norm,
        config=recipe.engine,
    )
    optimizer_state = OptimizerState(engine, model, optimizer, names)
    if masks:
        optimizer_state.load(FirstState(model, masks, optimizer_state.updates))
    return Session(
        recipe=recipe,
        world=world,
        device=device,
        train_set=inputs.train,
        val_set=inputs.val,
        plan=plan,
        model=model,
        optimizer=optimizer,
        optimizer_state=optimizer_state,
        scheduler=scheduler,
        controller=controller,
        engine=engine,
        loss_function=nn.CrossEntropyLoss(label_smoothing=recipe.optim.label_smoothing),
        initial_weights_hash=initial_hash,
    )


def agree_on_fused_steps(device: torch.device) -> None:
    """Let no rank round differently: without a fused step on one, none is used. Collective."""
    missing = torch.tensor([float(find_kernel(device) is None)], device=device)
    if sum_over_ranks(missing) > 0:
        os.environ["SCL_FUSED"] = "0"
