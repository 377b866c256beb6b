"""A checkpoint as one process alone writes it, for tests of what is on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.checkpoints.checkpoint import Checkpoint
from launcher.checkpoints.manifest import Evaluation, Manifest
from launcher.checkpoints.write import discard, open_folder, publish, write_parts


def save(
    root: Path,
    *,
    step: int,
    parts: dict[str, Any],
    meta: dict[str, Any],
    keep: int,
    keep_pareto: int = 0,
    evaluation: Evaluation | None = None,
) -> Checkpoint:
    """Write and publish, as the ranks do it through launcher/run/saver.py."""
    folder = open_folder(root, step)
    try:
        files = write_parts(folder, parts)
        manifest = Manifest(step=step, meta=meta, evaluation=evaluation, files=files)
        return publish(root, folder, manifest, keep=keep, keep_pareto=keep_pareto)
    except BaseException:
        discard(folder)
        raise


def evaluation(top1: float, live: int = 100, *, final: bool = True) -> Evaluation:
    return Evaluation(top1=top1, live=live, connections=1000, final=final)
