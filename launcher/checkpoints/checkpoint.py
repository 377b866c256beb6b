"""Checkpoints on disk, as a reader sees them: found, verified, loaded without running code.

A checkpoint root looks like this; whoever kills the writers at any moment finds it usable:

    step-00000120/   model.pt  optimizer-00000.pt …  rank-00000.pt …  manifest.json
    step-00000240/
    step-00000240.1/ the same step saved again: beside the first, which goes once this one is named
    latest           the name of the newest folder
    best             the name of the best one, which retention spares
    pareto.json      accuracy against connections: every model that no other surpasses in both

Written by launcher/run/saver.py through write.py; retention.py decides what stays.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from launcher.checkpoints.manifest import (
    CheckpointError,
    Evaluation,
    Manifest,
    folders,
    manifests,
    problems,
    read_manifest,
    read_pointer,
)

_log = logging.getLogger("scl.checkpoint")
PART_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint: its folder, the training step it was taken at, the caller's meta."""

    path: Path
    step: int
    meta: dict[str, Any]
    evaluation: Evaluation | None = None


def find(root: Path) -> Checkpoint | None:
    """The newest sound checkpoint in `root`: the one `latest` names, or else the next newest.

    Damaged ones are passed over with a single warning that names them. None if there are no
    checkpoints at all. Raises CheckpointError if there are some and not one is sound.
    """
    present = folders(root)
    if not present:
        return None
    named, problem = read_pointer(root, "latest")
    complaints = [problem] if problem else []
    candidates = ([named] if named else []) + [n for n in reversed(manifests(root)) if n != named]
    # Without a readable manifest there is no age; they come last, to be named in the complaint.
    candidates += [folder.name for folder in present if folder.name not in candidates]
    for name in candidates:
        wrong = verify(root / name)
        if not wrong:
            if complaints:
                _log.warning("%s; using %s instead", "; ".join(complaints), root / name)
            return _open(root / name)
        complaints.append(f"checkpoint {name} is damaged ({', '.join(wrong)})")
    raise CheckpointError(
        f"No usable checkpoint in {root}: {'; '.join(complaints)}. Move the folder away to start "
        "anew, or restore one of them from a backup."
    )


def resolve(root: Path, resume: str) -> Checkpoint | None:
    """What a run that saves to `root` shall continue from, by `CheckpointConfig.resume`.

    None means: start anew. Raises CheckpointError for 'never' where checkpoints exist, for a path
    at which there is no sound checkpoint, and as `find` does.
    """
    if resume == "auto":
        return find(root)
    if resume == "never":
        if present := folders(root):
            raise CheckpointError(
                f"{root} already holds checkpoints (newest: {present[-1].name}) and the recipe "
                "says resume: never. Choose another run folder, or say resume: auto to continue."
            )
        return None
    return read(Path(resume))


def read(path: Path) -> Checkpoint:
    """The checkpoint at `path`, or the newest sound one in it if `path` holds several.

    Raises CheckpointError naming every problem found.
    """
    if folders(path):
        newest = find(path)
        assert newest is not None
        return newest
    if wrong := verify(path):
        raise CheckpointError(f"{path} is no usable checkpoint: {', '.join(wrong)}")
    return _open(path)


def verify(path: Path, on_bytes: Callable[[int], object] | None = None) -> list[str]:
    """Everything wrong with the checkpoint folder `path`; empty if it is sound. Reads all of it.

    `on_bytes` is called with the size of each file when it has been checked.
    """
    return problems(path, read_content=True, on_bytes=on_bytes)


def list_checkpoints(root: Path) -> list[Checkpoint]:
    """The checkpoints in `root` that are complete by size, oldest save first; content is not read.

    After a rewind this order differs from that of steps: an abandoned later step comes earlier.
    """
    return [
        opened(root / name, manifest)
        for name, manifest in manifests(root).items()
        if not problems(root / name, read_content=False)
    ]


def load_part(checkpoint: Checkpoint, name: str, *, mapped: bool = False) -> Any:
    """The tree saved as part `name`, on the CPU.

    `mapped`: tensors stay in the file until they are read, element by element.

    Raises CheckpointError if there is no such part, if it cannot be read, or if it holds anything
    but tensors and plain values (nothing in it is run).
    """
    path = checkpoint.path / f"{name}.pt"
    if not PART_NAME.match(name) or not path.is_file():
        parts = ", ".join(sorted(part.stem for part in checkpoint.path.glob("*.pt")))
        raise CheckpointError(f"{checkpoint.path} has no part '{name}'; it has: {parts or 'none'}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it is damaged, or holds more than tensors and plain values "
            f"(found: {foreign_types(path) or 'nothing that can be named'}), which could run code "
            "when loaded."
        ) from error
    # A damaged archive fails in whatever way the damage suggests: RuntimeError, IndexError, …
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def foreign_types(path: Path) -> str:
    """What a part holds beside tensors and plain values."""
    try:
        return ", ".join(sorted(get_unsafe_globals_in_checkpoint(path)))
    # Not torch's own format (a bare pickle, say): there is nothing to list the types of.
    except Exception:
        return ""


def opened(path: Path, manifest: Manifest) -> Checkpoint:
    return Checkpoint(path, manifest.step, manifest.meta, manifest.evaluation)


def _open(path: Path) -> Checkpoint:
    return opened(path, read_manifest(path))
