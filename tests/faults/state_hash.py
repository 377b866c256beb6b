"""One hash of everything a checkpoint holds: what "the same state, bit for bit" means."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def state_hash(checkpoint: Path) -> str:
    """SHA-256 over every tensor and value of all parts: model, optimizer, generators, counts.

    By content, not by file: how a file lies on disk may depend on how its objects came about.
    """
    digest = hashlib.sha256()
    for path in sorted(checkpoint.rglob("*")):
        if path.suffix == ".pt":
            tree = torch.load(path, map_location="cpu", weights_only=True)
        elif path.suffix == ".safetensors":
            tree = load_file(path)
        else:
            continue
        digest.update(path.name.encode())
        _update(digest, tree)
    return digest.hexdigest()


def _update(digest: Any, tree: Any) -> None:
    """Add a tree of tensors and plain values, whatever the order of its keys."""
    if isinstance(tree, torch.Tensor):
        digest.update(f"{tree.dtype}{tuple(tree.shape)}".encode())
        digest.update(tree.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(tree, dict):
        for key in sorted(tree, key=str):
            digest.update(str(key).encode())
            _update(digest, tree[key])
    elif isinstance(tree, list | tuple):
        for item in tree:
            _update(digest, item)
    else:
        digest.update(repr(tree).encode())
