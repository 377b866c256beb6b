"""The sparse model as files anyone can open, re-opened and checked before they count as written."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sclcore.connections import LayerBudget


class ExportError(Exception):
    """What was written does not hold what it should; the message says which tensor."""


def save_sparse_model(
    model: nn.Module,
    path: Path,
    *,
    masks: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write the plain state_dict of `model` as safetensors; it loads into the unmodified model.

    `masks` (name → bool, true is live) is what the zeros must agree with. `metadata` goes into the
    file's header as JSON, under the key "scl". The file is written under
    a temporary name, re-opened, compared tensor by tensor, and only then renamed: ExportError
    leaves nothing behind.
    """
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # One entry: safetensors writes several in any order, and equal models shall be equal files.
        save_file(state, temporary, metadata={"scl": json.dumps(dict(metadata or {}))})
        _verify(temporary, state, masks or {})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _verify(path: Path, state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != set(state):
            raise ExportError(f"{path.name} holds other tensors than the model")
        for name, expected in state.items():
            if not torch.equal(_bits(file.get_tensor(name)), _bits(expected)):
                raise ExportError(f"{name} reads back with other values than were written")
        for name, mask in masks.items():
            if name not in state or state[name].shape != mask.shape:
                raise ExportError(f"the mask of {name} fits no tensor of the model")
            pruned = file.get_tensor(name)[~mask.cpu()]
            if torch.count_nonzero(pruned):
                raise ExportError(f"{name} has non-zero weights where its mask says pruned")


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: unlike its values, those of a NaN are equal to themselves."""
    return tensor.contiguous().flatten().view(torch.uint8)


def budgets_csv(budgets: Sequence[LayerBudget]) -> str:
    """One line per layer: layer, shape, connections, live, density, MACs dense and sparse."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["layer", "shape", "connections", "live", "density", "macs_dense", "macs"])
    for b in budgets:
        shape = "x".join(map(str, b.shape))
        row = [b.layer, shape, b.connections, b.live, f"{b.density:.6f}", b.macs_dense, b.macs]
        writer.writerow(row)
    return text.getvalue()
