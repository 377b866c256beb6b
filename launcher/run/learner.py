"""What a rank trains: its copy of the network, with the optimizer and the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from data.augmentation.mixing import mix, mixed_targets
from data.shards.manifest import ImageStats
from data.stream.pipeline import normalise
from launcher.cluster.world import World
from launcher.run.average import WeightAverage
from launcher.run.optimizer_state import OptimizerState
from launcher.run.parameters import Parameters
from launcher.run.teacher import Teacher
from sclcore.network.connections import LayerBudget
from sclcore.optim.sparse import SparseOptimizer


@dataclass(frozen=True)
class Learner:
    """The network of one rank, its optimizer and DeepSpeed's engine around both."""

    world: World
    device: torch.device
    model: nn.Module
    optimizer: Optimizer
    optimizer_state: OptimizerState
    engine: Any
    loss_function: nn.Module
    image: ImageStats
    """What the images of the data set are, for their normalisation."""
    connections: int
    """How many the network has, live and dead."""
    budgets: Sequence[LayerBudget]
    """Of the dense network's layers, on rank 0; elsewhere none."""
    mixing: bool
    """Whether training mixes samples in pairs (mixup, CutMix)."""
    teacher: Teacher | None = None
    """Whose outputs are learned besides the labels."""
    average: WeightAverage | None = None
    """Of the weights, where the recipe keeps one."""
    initial_weights_hash: str | None = None
    """Of the weights that a new run starts from, before any mask; None where it continues."""

    @property
    def parameters(self) -> Parameters:
        """Those of `model`, as this rank holds them."""
        return self.optimizer_state.parameters

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits [batch, classes] in float32."""
        return self.network(self.images(batch))

    def images(self, batch: dict[str, Tensor]) -> Tensor:
        """What the network sees of a training batch: normalised and, where that is on, mixed."""
        images = normalise(batch["image"], self.image)
        return mix(images, batch) if self.mixing else images

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross entropy; where samples are mixed, with their labels mixed likewise.

        With a teacher, which sees the same images, its share of the loss is what it says of them.
        """
        labels = batch["label"]
        if self.mixing:
            labels = mixed_targets(batch, logits.shape[1])
        loss = self.loss_function(logits, labels)
        if self.teacher is None:
            return loss
        return self.teacher.loss(logits, self.teacher.logits(self.images(batch)), loss)

    def network(self, images: Tensor) -> Tensor:
        """Logits [batch, classes] in float32, of normalised images."""
        dtype = next(self.model.parameters()).dtype
        return self.engine(images.to(dtype)).float()

    def before_update(self) -> None:
        """Let the method prepare the network for the forward passes of an update."""
        if isinstance(self.optimizer, SparseOptimizer):
            self.optimizer.before_update()

    def pass_again(self, batch: dict[str, Tensor], loss: Tensor, *, share: float) -> None:
        """Give the method the loss of a micro-batch, and those of the further passes it asks for.

        The statistics of batch norm are those of the batch in each pass, and are kept of the first
        alone: were they others, so would be what the losses are compared for. Random numbers of
        dropout are drawn as if there were no further pass.
        """
        optimizer = self.optimizer
        if not isinstance(optimizer, SparseOptimizer):
            return
        optimizer.add_loss(0, loss, share)
        if optimizer.passes == 1:
            return
        kept = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        devices = [self.device] if self.device.type == "cuda" else []
        for number in range(1, optimizer.passes):
            optimizer.before_pass(number)
            with torch.no_grad(), torch.random.fork_rng(devices):
                optimizer.add_loss(number, self.loss(self.forward(batch), batch), share)
        optimizer.before_pass(0)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(kept[name])

    def after_update(self) -> None:
        """Take the network as it is now into the average."""
        if self.average is not None:
            self.average.update()

    def after_epoch(self, results: dict[str, float]) -> None:
        """Tell the method how the network does. Collective."""
        if isinstance(self.optimizer, SparseOptimizer):
            self.optimizer.after_epoch(results)

    def count_connections(self) -> tuple[int, int]:
        """How many connections are live, and how many there are. Collective."""
        if isinstance(self.optimizer, SparseOptimizer):
            live = self.optimizer.live_connections().values()
            return sum(live), sum(self.optimizer.connection_sizes().values())
        return self.connections, self.connections
