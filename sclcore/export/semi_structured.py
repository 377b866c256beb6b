"""2:4 weights: of every four neighbours at most two are not zero, as sparse tensor cores want."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sclcore.export.files import ExportError

N, M = 2, 4
# Taken by both of PyTorch's back ends in float16 and bfloat16; cuSPARSELt's alone wants 16, 16.
_ROWS, _COLUMNS = 32, 64


@dataclass(frozen=True)
class Pattern:
    """What one weight has of 2:4. `blocks` of four neighbours, of which `broken` have over two."""

    name: str
    kind: str
    shape: tuple[int, ...]
    blocks: int
    broken: int
    hardware: str
    """Empty where PyTorch's sparse kernels take this weight; else why they do not."""

    @property
    def holds(self) -> bool:
        return self.blocks > 0 and self.broken == 0

    @property
    def qualifies(self) -> bool:
        """Whether this weight runs on sparse tensor cores as it is."""
        return self.holds and not self.hardware


def patterns(model: nn.Module) -> list[Pattern]:
    """The pattern of every weight of a Linear or Conv, along its inputs (in · k · k for a Conv)."""
    found = []
    for name, module, weight in _weights(model):
        blocks = _blocks(weight)
        found.append(
            Pattern(
                name=name,
                kind=type(module).__name__,
                shape=tuple(weight.shape),
                blocks=0 if blocks is None else len(blocks),
                broken=0 if blocks is None else int((blocks.ne(0).sum(1) > N).sum()),
                hardware=_obstacle(module, weight),
            )
        )
    return found


@torch.no_grad()
def to_semi_structured(model: nn.Module) -> dict[str, int]:
    """Keep the two largest of every four neighbours, in place; how many weights each layer lost.

    Of the layers that PyTorch's sparse kernels take; all others stay as they are, since the pattern
    would cost them accuracy and gain nothing.
    """
    lost = {}
    for name, module, weight in _weights(model):
        blocks = _blocks(weight)
        if blocks is None or _obstacle(module, weight):
            continue
        before = int(torch.count_nonzero(blocks))
        smallest = torch.sort(blocks.abs(), dim=1, stable=True).indices[:, : M - N]
        weight.copy_(blocks.scatter(1, smallest, 0.0).view_as(weight))
        lost[name] = before - int(torch.count_nonzero(weight))
    return lost


def load_semi_structured(model: nn.Module, dtype: torch.dtype = torch.float16) -> list[str]:
    """Put `model` on the GPU in `dtype`, its 2:4 Linears on sparse tensor cores; their names.

    Raises ExportError without CUDA: PyTorch has these kernels for no other device.
    """
    if not torch.cuda.is_available():
        raise ExportError("sparse tensor cores need a GPU (CUDA, compute capability 8.0 or more)")
    model.to("cuda", dtype)
    taken = {pattern.name for pattern in patterns(model) if pattern.qualifies}
    for name, module, weight in _weights(model):
        if name in taken:
            sparse = torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())
            module.weight = nn.Parameter(sparse, requires_grad=False)
    return sorted(taken)


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | _ConvNd) and not getattr(module, "transposed", False):
            yield f"{name}.weight" if name else "weight", module, module.weight


def _blocks(weight: Tensor) -> Tensor | None:
    """[blocks, 4]; None where a feature's inputs are no multiple of four."""
    inputs = weight[0].numel()
    return None if inputs % M else weight.detach().reshape(-1, M)


def _obstacle(module: nn.Module, weight: Tensor) -> str:
    if weight[0].numel() % M:
        return f"{weight[0].numel()} inputs per feature are no multiple of {M}"
    if not isinstance(module, nn.Linear):
        return "PyTorch has no sparse convolution"
    rows, columns = weight.shape
    if rows % _ROWS or columns % _COLUMNS:
        return f"{rows}×{columns} is no multiple of {_ROWS}×{_COLUMNS}"
    return ""
