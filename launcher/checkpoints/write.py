"""Checkpoints on disk, as the writers see them: each writes its parts, one publishes the folder.

Parts go into a temporary folder that every rank can see; when all are there, rank 0 adds the
manifest and gives the folder its name. Until then it does not exist for a reader.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch

from data.files import fsync_dir, remove_leftovers, temporary_beside
from launcher.checkpoints.checkpoint import PART_NAME, Checkpoint, foreign_types, opened
from launcher.checkpoints.disk_space import shortage
from launcher.checkpoints.manifest import (
    CheckpointError,
    Manifest,
    Written,
    encode,
    file_problems,
    free_name,
    manifests,
)
from launcher.checkpoints.retention import retire

_log = logging.getLogger("scl.checkpoint")
# A network file system may show a node what another has made there only after a while.
_APPEARS_WITHIN_S = 60.0


def writing_thread() -> ThreadPoolExecutor:
    """One thread of low priority, for the processor time that training leaves.

    On a CPU whose cores are all busy a step waits for the slowest of them. Not the lowest priority:
    the thread holds the interpreter now and then, and training waits for that.
    """

    def give_way() -> None:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)

    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint", initializer=give_way)


def open_folder(root: Path, step: int, content: int = 0) -> Path:
    """A new temporary folder for the parts of `step`, of `content` bytes altogether.

    Raises CheckpointError if there is no room for them, OSError if the disk refuses.
    """
    root.mkdir(parents=True, exist_ok=True)
    for name in remove_leftovers(root):
        _log.info("removed %s, left by a run that died while saving", name)
    if lack := shortage(root, content):
        raise CheckpointError(lack)
    folder = temporary_beside(root / f"step-{step:08d}")
    folder.mkdir()
    return folder


def discard(folder: Path) -> None:
    """Give up a temporary folder, whatever is in it."""
    shutil.rmtree(folder, ignore_errors=True)


def write_parts(folder: Path, parts: dict[str, Any]) -> dict[str, Written]:
    """Write each tree of tensors and plain values to `<name>.pt` in `folder`, durably.

    Raises CheckpointError if `folder` is not seen from here or a part could not be loaded again
    without running code, OSError if the disk refuses; nothing of these parts is left then.
    """
    for name in parts:
        if not PART_NAME.match(name):
            raise CheckpointError(f"'{name}' cannot be a part's name: use letters, digits, . _ -")
    _wait_for(folder)
    try:
        return {f"{name}.pt": _write_part(folder / f"{name}.pt", parts[name]) for name in parts}
    except BaseException:
        # Room for the others, and for the next attempt.
        for name in parts:
            (folder / f"{name}.pt").unlink(missing_ok=True)
        raise


def publish(
    root: Path, folder: Path, manifest: Manifest, *, keep: int, keep_pareto: int
) -> Checkpoint:
    """Make the written `folder` a checkpoint of `root`, point `latest` to it, retire old ones.

    `manifest` says everything but `serial`. What was there stays usable throughout. Raises
    CheckpointError if a file is not as it was written or the disk refuses, in which case the
    folder may still be there.
    """
    _check(manifest)
    _wait_for_files(folder, manifest.files)
    try:
        known = manifests(root)
        serial = 1 + max((earlier.serial for earlier in known.values()), default=0)
        manifest = manifest.model_copy(update={"serial": serial})
        target = root / free_name(root, manifest.step)
        finish_folder(folder, target, manifest)
        known[target.name] = manifest
        retire(root, known, keep=keep, keep_pareto=keep_pareto)
    except OSError as error:
        raise CheckpointError(f"Cannot save step {manifest.step} in {root}: {error}") from error
    return opened(target, manifest)


def finish_folder(folder: Path, target: Path, manifest: Manifest) -> None:
    """Add the manifest and give the folder its name. Raises OSError."""
    _write_durably(folder / "manifest.json", encode(manifest))
    fsync_dir(folder)
    folder.rename(target)
    fsync_dir(target.parent)


def _check(manifest: Manifest) -> None:
    if not manifest.files:
        raise CheckpointError("A checkpoint without parts is not a checkpoint.")
    if manifest.step < 0:
        raise CheckpointError(f"A step is never negative; got {manifest.step}.")
    try:
        encode(manifest)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"The checkpoint's meta must be plain JSON: {error}") from error


def _wait_for(folder: Path) -> None:
    deadline = time.monotonic() + _APPEARS_WITHIN_S
    while not folder.is_dir():
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{folder.parent} is not the same folder here as on the node of rank 0: the run "
                "folder must be on a file system that all nodes share; choose it with run_dir"
            )
        time.sleep(0.2)


def _wait_for_files(folder: Path, files: dict[str, Written]) -> None:
    deadline = time.monotonic() + _APPEARS_WITHIN_S
    while wrong := file_problems(folder, files, read_content=False):
        if not folder.is_dir() or time.monotonic() > deadline:
            raise CheckpointError(f"What was written is not there: {', '.join(wrong)}")
        time.sleep(0.2)


def _write_part(path: Path, tree: Any) -> Written:
    with path.open("wb") as file:
        hashing = HashingWriter(file)
        try:
            torch.save(tree, hashing)  # pyright: ignore[reportArgumentType]
        except OSError:
            raise
        # torch wraps a full disk in a RuntimeError and lets pickle's many errors through.
        except Exception as error:
            raise CheckpointError(
                f"Part '{path.stem}' cannot be saved: {hashing.refused or error}"
            ) from error
        file.flush()
        os.fsync(file.fileno())
    # Better now than on the day the checkpoint is needed.
    if foreign := foreign_types(path):
        raise CheckpointError(
            f"Part '{path.stem}' holds {foreign}, which cannot be loaded again safely; a part may "
            "hold tensors, numbers, strings and containers of these."
        )
    return Written(bytes=hashing.bytes, sha256=hashing.digest.hexdigest())


class HashingWriter:
    """Passes writes on and hashes them, which saves reading gigabytes back."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.bytes = 0
        self.refused: OSError | None = None
        """Why the disk refused, which torch reports as something else."""

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.refused = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
