"""A small network with every kind of gate, and the textbook's form of gates: factors of outputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

GATES = {"conv.weight": "norm", "deep.weight": "deep", "hidden.weight": "hidden"}
"""Tensor of connections → the module whose output its gates multiply."""


class GatedNet(nn.Module):
    """Convolutions with batch norm and with a bias, a hidden layer, an output. Input [n, 2, 4, 4].

    Smooth activations, because a kink would tell two correct programs apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.deep = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.hidden = nn.Linear(16, 5)
        self.head = nn.Linear(5, 3)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.uniform_(self.norm.bias, -0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.norm(self.conv(x)))
        x = nn.functional.avg_pool2d(nn.functional.gelu(self.deep(x)), 2)
        return self.head(self.hidden(x.flatten(1)).tanh())


def gated_net(seed: int = 0, dtype: torch.dtype = torch.float64) -> GatedNet:
    torch.manual_seed(seed)
    return GatedNet().to(dtype)


class Factors:
    """Multiplies the outputs of modules by gates, while it is entered."""

    def __init__(self, model: GatedNet, gates: Mapping[str, Tensor]) -> None:
        self._model, self._gates = model, gates

    def __enter__(self) -> None:
        self._hooks = []
        for name, gate in self._gates.items():
            module = self._model.get_submodule(GATES[name])

            def multiply(module: nn.Module, args: object, out: Tensor, g: Tensor = gate) -> Tensor:
                return out * g.view(1, -1, *[1] * (out.ndim - 2))

            self._hooks.append(module.register_forward_hook(multiply))

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()


def gated_batches(count: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 12, 2, 4, 4, generator=generator, dtype=dtype)
    return [(x, (2 * x[:, :, 0, 0].sum(1)).long().clamp(-1, 1) + 1) for x in images]
