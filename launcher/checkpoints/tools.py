"""What can be done to the checkpoints of a run from outside: verify, prune, convert."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from data.files import remove_tree, temporary_beside
from launcher.checkpoints.checkpoint import Checkpoint, load_part, read, verify
from launcher.checkpoints.disk_space import in_units, shortage
from launcher.checkpoints.manifest import (
    CheckpointError,
    Manifest,
    folders,
    manifests,
    read_manifest,
    read_pointer,
)
from launcher.checkpoints.retention import point, superfluous, updated_front
from launcher.checkpoints.saved_optimizer import SavedOptimizer, layout_of, optimizer_part
from launcher.checkpoints.write import discard, finish_folder, write_parts
from launcher.errors import UsageError
from launcher.folder.lock import lock
from launcher.recipe.checkpoint import CheckpointConfig


def root_of(run: Path) -> Path:
    """Where the checkpoints of `run` are: in its subfolder, or in `run` itself.

    Raises UsageError where there are none.
    """
    for root in (run / "checkpoints", run):
        if folders(root):
            return root
    raise UsageError(
        f"{run} holds no checkpoints: give the folder of a run, such as runs/digits_scl"
    )


def damaged(path: Path) -> dict[Path, list[str]]:
    """Everything wrong with each checkpoint of a run, or with the one at `path`; reads it all.

    Raises UsageError where there are none.
    """
    chosen = [path] if (path / "manifest.json").is_file() else folders(root_of(path))
    with tqdm(
        total=sum(map(_size, chosen)),
        unit="B",
        unit_scale=True,
        leave=False,
        disable=not sys.stderr.isatty(),
    ) as bar:
        return {folder: verify(folder, bar.update) for folder in chosen}


def prune(run: Path, *, keep: int | None, dry_run: bool) -> list[tuple[Path, str, str]]:
    """Delete what retention does not keep, damaged checkpoints, and what dead writers left.

    `keep` replaces the recipe's. Returns (path, reason, size) of each. Raises UsageError while a
    run is writing there or where there are no checkpoints, CheckpointError if not one is sound: the
    last sound one is never deleted.
    """
    root = root_of(run)
    with lock(root.parent if root != run else run):
        wrong = {path: text for path, text in damaged(root).items() if text}
        sound = {n: m for n, m in manifests(root).items() if root / n not in wrong}
        if not sound:
            raise CheckpointError(
                f"no checkpoint in {root} is sound, so none is deleted: keep what may be rescued, "
                "or remove the folder yourself"
            )
        config = _config_of(sound)
        newest = _latest(root, sound)
        leaving = superfluous(
            sound,
            updated_front(root, sound),
            keep=keep or config.keep,
            keep_pareto=config.keep_pareto,
        )
        leaving = [name for name in leaving if name != newest]
        reasons = {path: f"damaged: {text[0]}" for path, text in wrong.items()}
        reasons |= {root / name: "retention does not keep it" for name in leaving}
        # Whoever wrote these is gone: the folder is locked by this process now.
        reasons |= dict.fromkeys(sorted(root.glob(".tmp-*")), "left by a run that died")
        found = [(path, reason, in_units(_size(path))) for path, reason in reasons.items()]
        if not dry_run:
            # Before anything goes, nothing points to it any more.
            point(root, {n: m for n, m in sound.items() if n not in leaving}, newest)
            for path in reasons:
                _remove(path)
        return found


def to_model(source: Path, out: Path) -> None:
    """Write the network of a checkpoint as safetensors: a plain state_dict, zeros included.

    Raises UsageError if `out` exists, CheckpointError if `source` is no sound checkpoint.
    """
    _check_new(out)
    found = _newest(source)
    state = {
        name: value.contiguous().clone()
        for name, value in load_part(found, "model").items()
        if isinstance(value, torch.Tensor)
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(out)
    evaluated = found.evaluation.model_dump() if found.evaluation else {}
    about = {"model": found.meta["recipe"]["model"]["name"], "step": found.step, **evaluated}
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
    _check_new(out)
    found = _newest(source)
    if lack := shortage(out.parent, _size(found.path)):
        raise UsageError(f"{out} cannot be written: {lack}; choose another place")
    pieces = SavedOptimizer(found).whole()
    others = [p.stem for p in found.path.glob("*.pt") if not p.stem.startswith("optimizer-")]
    parts = {name: load_part(found, name) for name in sorted(others)}
    meta = found.meta | {
        "optimizer": found.meta["optimizer"] | {"pieces": {optimizer_part(0): layout_of(pieces)}}
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(out)
    temporary.mkdir()
    try:
        files = write_parts(temporary, parts | {optimizer_part(0): pieces})
        manifest = Manifest(step=found.step, meta=meta, evaluation=found.evaluation, files=files)
        finish_folder(temporary, out, manifest)
    except OSError as error:
        raise CheckpointError(f"Cannot write {out}: {error}") from error
    finally:
        discard(temporary)


def _latest(root: Path, sound: dict[str, Manifest]) -> str:
    """What `latest` names, if it is sound: who rewound a run by hand means it."""
    named, _ = read_pointer(root, "latest")
    return named if named in sound else [*sound][-1]


def _newest(source: Path) -> Checkpoint:
    return read(source if (source / "manifest.json").is_file() else root_of(source))


def _check_new(out: Path) -> None:
    if out.exists():
        raise UsageError(f"{out} exists: choose another name, or remove it first")


def _config_of(known: dict[str, Manifest]) -> CheckpointConfig:
    """The retention of the newest start of the run."""
    return CheckpointConfig.model_validate([*known.values()][-1].meta["recipe"]["checkpoint"])


def _size(folder: Path) -> int:
    try:
        return sum(file.bytes for file in read_manifest(folder).files.values())
    except (OSError, ValueError):
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _remove(path: Path) -> None:
    if path.name.startswith(".tmp-"):
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    else:
        remove_tree(path)
