"""The state_dict as safetensors or as PyTorch's own file, and budgets per layer as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sclcore.export.files import ExportError, same_bits, staged
from sclcore.network.connections import LayerBudget

State = Mapping[str, Tensor]


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
    state = _on_cpu(model.state_dict())
    with staged(path) as temporary:
        # One entry: safetensors writes several in any order, and equal models shall be equal files.
        save_file(state, temporary, metadata={"scl": json.dumps(dict(metadata or {}))})
        with safe_open(temporary, framework="pt") as file:
            read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _verify(path.name, read, state, masks or {})
    return path


def save_state_dict(model: nn.Module, path: Path) -> Path:
    """Write the plain state_dict of `model` with `torch.save`, for `torch.load(weights_only=True)`.

    Checked and renamed as by `save_sparse_model`.
    """
    state = _on_cpu(model.state_dict())
    with staged(path) as temporary:
        torch.save(state, temporary)
        _verify(path.name, torch.load(temporary, weights_only=True), state, {})
    return path


def _on_cpu(state: State) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}


def _verify(name: str, read: State, written: State, masks: Mapping[str, Tensor]) -> None:
    if set(read) != set(written):
        raise ExportError(f"{name} holds other tensors than the model")
    for key, expected in written.items():
        if not same_bits(read[key], expected):
            raise ExportError(f"{key} reads back with other values than were written")
    for key, mask in masks.items():
        if key not in written or written[key].shape != mask.shape:
            raise ExportError(f"the mask of {key} fits no tensor of the model")
        if torch.count_nonzero(read[key][~mask.cpu()]):
            raise ExportError(f"{key} has non-zero weights where its mask says pruned")


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
