"""What can be done to the checkpoints of a run from outside: verify, prune."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tqdm import tqdm

from data.files import remove_tree
from launcher.checkpoints.disk_space import in_units
from launcher.checkpoints.manifest import (
    CheckpointError,
    Manifest,
    folders,
    manifests,
    problems,
    read_pointer,
    root_of,
    size_of,
)
from launcher.checkpoints.retention import point, superfluous, updated_front
from launcher.errors import UsageError
from launcher.folder.lock import lock
from launcher.recipe.checkpoint import CheckpointConfig


def damaged(path: Path) -> dict[Path, list[str]]:
    """Everything wrong with each checkpoint of a run, or with the one at `path`; reads it all.

    Raises UsageError where there are none.
    """
    chosen = [path] if (path / "manifest.json").is_file() else folders(root_of(path))
    with tqdm(
        total=sum(map(size_of, chosen)),
        unit="B",
        unit_scale=True,
        leave=False,
        disable=not sys.stderr.isatty(),
    ) as bar:
        return {
            folder: problems(folder, read_content=True, on_bytes=bar.update) for folder in chosen
        }


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
        rows = [(path, reason, in_units(size_of(path))) for path, reason in reasons.items()]
        if not dry_run:
            # Before anything goes, nothing points to it any more.
            point(root, {n: m for n, m in sound.items() if n not in leaving}, newest)
            for path in reasons:
                _remove(path)
        return rows


def check_conversion(source: Path, out: Path) -> Path:
    """Where the checkpoint to convert is: `source`, or the folder of checkpoints of that run.

    Raises UsageError if there is none, or `out` exists.
    """
    if out.exists():
        raise UsageError(f"{out} exists: choose another name, or remove it first")
    return source if (source / "manifest.json").is_file() else root_of(source)


def _latest(root: Path, sound: dict[str, Manifest]) -> str:
    """What `latest` names, if it is sound: somebody may have rewound the run by hand."""
    named, _ = read_pointer(root, "latest")
    return named if named in sound else [*sound][-1]


def _config_of(known: dict[str, Manifest]) -> CheckpointConfig:
    """The retention of the newest start of the run."""
    return CheckpointConfig.model_validate([*known.values()][-1].meta["recipe"]["checkpoint"])


def _remove(path: Path) -> None:
    if path.name.startswith(".tmp-"):
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    else:
        remove_tree(path)
