"""What a rank trains: its copy of the network, with the optimizer and the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from data.augmentation.mixing import mix, mixed_targets
from data.shards.manifest import ImageStats
from data.stream.pipeline import normalise
from launcher.cluster.world import World
from launcher.run.optimizer_state import OptimizerState
from sclcore.connections import find_connections
from sclcore.sparse import SparseOptimizer


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
    mixing: bool
    """Whether training mixes samples in pairs (mixup, CutMix)."""
    initial_weights_hash: str | None = None
    """Of the weights that a new run starts from, before any mask; None where it continues."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits [batch, classes] in float32."""
        images = normalise(batch["image"], self.image)
        if self.mixing:
            images = mix(images, batch)
        return self.network(images)

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross entropy; where samples are mixed, with their labels mixed likewise."""
        labels = batch["label"]
        if self.mixing:
            labels = mixed_targets(batch, logits.shape[1])
        return self.loss_function(logits, labels)

    def network(self, images: Tensor) -> Tensor:
        """Logits [batch, classes] in float32, of normalised images."""
        dtype = next(self.model.parameters()).dtype
        return self.engine(images.to(dtype)).float()

    def count_connections(self) -> tuple[int, int]:
        """How many connections are live, and how many there are. Collective."""
        if isinstance(self.optimizer, SparseOptimizer):
            live = self.optimizer.live_connections().values()
            return sum(live), sum(self.optimizer.connection_sizes().values())
        total = sum(c.parameter.numel() for c in find_connections(self.model))
        return total, total
