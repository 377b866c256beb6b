"""Optimizer state in a checkpoint: pieces of parameters by name, read by whoever needs them.

Each rank saved what it held: of every parameter at most one stretch of elements, in row-major
order. A part `optimizer-00003` is a tree {name: {"shape", "start", "values": {key: tensor}}}; where
the pieces lie is in the checkpoint's meta, so that a rank opens only the files it needs. State that
has no elements of its parameter (a gate per row, a word) is in "whole", as it is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from launcher.checkpoints.checkpoint import Checkpoint, load_part
from launcher.checkpoints.manifest import CheckpointError

Pieces = dict[str, dict[str, Any]]


def optimizer_part(rank: int) -> str:
    """The part that `rank` writes."""
    return f"optimizer-{rank:05d}"


def layout_of(pieces: Pieces) -> dict[str, list[int]]:
    """[start, length] by parameter name, as `SavedOptimizer` expects them in the meta."""
    return {name: [piece["start"], piece["length"]] for name, piece in pieces.items()}


class SavedOptimizer:
    """The optimizer state of `checkpoint`, whatever ranks and ZeRO stage wrote it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._layout: dict[str, dict[str, list[int]]] = checkpoint.meta["optimizer"]["pieces"]
        self._open: dict[str, Pieces] = {}
        counts = checkpoint.meta["optimizer"]
        # Checkpoints of version 0.1.0 call them so.
        self.updates: list[int] = counts["updates" if "updates" in counts else "draws"]

    def names(self) -> list[str]:
        """The parameters, in the order in which they were saved."""
        return [*dict.fromkeys(name for part in self._layout.values() for name in part)]

    def read(self, name: str, start: int, length: int) -> dict[str, Tensor]:
        """Elements `start` … `start + length` of everything saved of parameter `name`.

        Raises CheckpointError where the saved pieces do not cover them.
        """
        state: dict[str, Tensor] = {}
        covered = 0
        for part, pieces in self._layout.items():
            if name not in pieces:
                continue
            first, size = pieces[name]
            begin, end = max(start, first), min(start + length, first + size)
            if begin >= end:
                continue
            covered += end - begin
            for key, value in self._part(part)[name]["values"].items():
                if value.ndim == 0:  # of the whole parameter, the same in every piece
                    state[key] = value
                    continue
                target = state.setdefault(key, torch.zeros(length, dtype=value.dtype))
                target[begin - start : end - start] = value[begin - first : end - first]
        if covered != length:
            raise CheckpointError(
                f"{self._checkpoint.path} holds {covered:,} of {length:,} elements of {name}: it "
                "was saved from another model"
            )
        return state

    def read_whole(self, name: str) -> dict[str, Any]:
        """What was saved of parameter `name` that cannot be cut: tensors of any shape, numbers."""
        parts = [part for part, pieces in self._layout.items() if name in pieces]
        return {k: v for part in parts for k, v in self._part(part)[name].get("whole", {}).items()}

    def whole(self) -> Pieces:
        """Everything, each parameter in one piece."""
        shapes = {n: p["shape"] for part in self._layout for n, p in self._part(part).items()}
        return {name: self._joined(name, shapes[name]) for name in self.names()}

    def _joined(self, name: str, shape: list[int]) -> dict[str, Any]:
        size = math.prod(shape)
        piece = {"shape": shape, "start": 0, "length": size, "values": self.read(name, 0, size)}
        uncut = self.read_whole(name)
        return piece | ({"whole": uncut} if uncut else {})

    def _part(self, part: str) -> Pieces:
        if part not in self._open:
            self._open[part] = load_part(self._checkpoint, part, mapped=True)
        return self._open[part]
