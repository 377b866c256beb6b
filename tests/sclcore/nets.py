"""Tiny networks and data that several tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn


class Mixed(nn.Module):
    """Every kind of connection, norms as dense parameters. Input [batch, 2, 6, 6].

    Smooth activations, because a kink would tell two correct programs apart.
    """

    def __init__(self, attention: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True) if attention else None
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.bn(self.conv(x)))
        x = nn.functional.silu(self.up(nn.functional.avg_pool2d(x, 2)))
        tokens = nn.functional.avg_pool2d(x, 3).flatten(2).transpose(1, 2)
        if self.attention is not None:
            tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(self.norm(tokens).mean(1))


# By hand: positions at which each weight of Mixed is used in one pass over a 6 × 6 image.
MIXED_USES = {
    "conv.weight": 6 * 6,  # one per output pixel
    "up.weight": 3 * 3,  # one per input pixel, after pooling by 2
    "attention.in_proj_weight": 2 * 2,  # one per token, after pooling 6 × 6 by 3
    "attention.out_proj.weight": 2 * 2,
    "head.weight": 1,  # the mean token
}


def mixed_batches(dtype: torch.dtype, count: int = 10) -> list[tuple[Tensor, Tensor]]:
    """Images and what a larger-than-life teacher of the same kind makes of them."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        images = torch.randn(count, 8, 2, 6, 6, dtype=torch.float64)
        teacher = Mixed().to(torch.float64)
        for p in teacher.parameters():
            if p.ndim > 1:
                p.mul_(3)
        targets = teacher(images.flatten(0, 1))
        targets = ((targets - targets.mean(0)) / targets.std(0)).view(count, 8, 3)
    return [(x.to(dtype), y.to(dtype)) for x, y in zip(images, targets, strict=True)]


class Mlp(nn.Sequential):
    """8 → 16 → 4 with 192 connections: the smallest network that learns something."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    @property
    def first(self) -> nn.Linear:
        return cast(nn.Linear, self[0])

    @property
    def second(self) -> nn.Linear:
        return cast(nn.Linear, self[2])


def mlp(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> Mlp:
    torch.manual_seed(seed)
    return Mlp().to(dtype)


def mlp_batches(
    count: int, *, size: int = 12, dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    """Inputs of which only the first three matter, so that a sparse network is the right one."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, size, 8, generator=generator, dtype=torch.float64)
    teacher = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    y = torch.sin(x[..., :3] @ teacher)
    return [(a.to(dtype), b.to(dtype)) for a, b in zip(x, y, strict=True)]


def mse_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]
) -> float:
    """One step of any loop a torch user writes."""
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(batch[0]), batch[1])
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[tuple[Tensor, Tensor]],
    after: Callable[[int], None] | None = None,
) -> list[float]:
    losses = []
    for index, batch in enumerate(batches):
        losses.append(mse_step(model, optimizer, batch))
        if after is not None:
            after(index)
    return losses


def few_values(shape: tuple[int, ...], density: float, values: int = 8, seed: int = 0) -> Tensor:
    """A weight with `values` different live values, some of them far more frequent."""
    generator = torch.Generator().manual_seed(seed)
    live = torch.rand(shape, generator=generator) < density
    few = torch.randn(values, generator=generator)
    index = (torch.rand(shape, generator=generator) ** 3 * values).long()
    return few[index].where(live, 0.0)
