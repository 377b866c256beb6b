"""A checkpoint in other forms: the network alone, or its optimizer state in one file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from data.files import temporary_beside
from launcher.checkpoints.checkpoint import load_part, read
from launcher.checkpoints.disk_space import shortage
from launcher.checkpoints.manifest import CheckpointError, Manifest, size_of
from launcher.checkpoints.saved_optimizer import SavedOptimizer, layout_of, optimizer_part
from launcher.checkpoints.tools import check_conversion
from launcher.checkpoints.write import discard, finish_folder, write_parts
from launcher.errors import UsageError


def to_model(source: Path, out: Path) -> None:
    """Write the network of a checkpoint as safetensors: a plain state_dict, zeros included.

    Raises UsageError if `out` exists, CheckpointError if `source` is no sound checkpoint.
    """
    checkpoint = read(check_conversion(source, out))
    state = {
        name: value.contiguous().clone()
        for name, value in load_part(checkpoint, "model").items()
        if isinstance(value, torch.Tensor)
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(out)
    evaluated = checkpoint.evaluation.model_dump() if checkpoint.evaluation else {}
    about = {
        "model": checkpoint.meta["recipe"]["model"]["name"],
        "step": checkpoint.step,
        **evaluated,
    }
    try:
        save_file(state, temporary, metadata={"scl": json.dumps(about)})
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def to_whole(source: Path, out: Path) -> None:
    """Write a checkpoint as the folder `out`, with the optimizer state in one part.

    Raises UsageError if `out` exists or there is no room, CheckpointError if `source` is no sound
    checkpoint or the disk refuses.
    """
    checkpoint = read(check_conversion(source, out))
    if lack := shortage(out.parent, size_of(checkpoint.path)):
        raise UsageError(f"{out} cannot be written: {lack}; choose another place")
    pieces = SavedOptimizer(checkpoint).whole()
    others = [p.stem for p in checkpoint.path.glob("*.pt") if not p.stem.startswith("optimizer-")]
    parts = {name: load_part(checkpoint, name) for name in sorted(others)}
    meta = checkpoint.meta | {
        "optimizer": checkpoint.meta["optimizer"]
        | {"pieces": {optimizer_part(0): layout_of(pieces)}}
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(out)
    temporary.mkdir()
    try:
        files = write_parts(temporary, parts | {optimizer_part(0): pieces})
        manifest = Manifest(
            step=checkpoint.step, meta=meta, evaluation=checkpoint.evaluation, files=files
        )
        finish_folder(temporary, out, manifest)
    except OSError as error:
        raise CheckpointError(f"Cannot write {out}: {error}") from error
    finally:
        discard(temporary)
