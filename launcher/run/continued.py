"""`--continue-with`: a run that goes on with another λ, learning rate or length, on purpose.

Everything still to come follows from the new recipe and the update that the run has reached, as it
follows from the old one in a run that nobody changed: so what is interrupted after the change ends
as what is not. Masks that were final stay so, unless it is they that are to change.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from data.files import atomic_write
from launcher.checkpoints.checkpoint import Checkpoint
from launcher.errors import UsageError
from launcher.recipe.kinds import joined, written
from launcher.recipe.recipe import Recipe, differences
from sclcore.methods.scl import SCLMethod
from sclcore.schedule import Schedule

MAY_CHANGE = (
    *("optim.epochs", "optim.global_batch_size", "optim.lr", "optim.momentum"),
    *("optim.weight_decay", "optim.clip_grad_norm", "optim.label_smoothing"),
    *("optim.early_stop_epochs", "method.lam"),
    *("method.target_density", "method.target_macs", "method.mask_lr", "schedule.lr"),
    *("schedule.lr_warmup", "schedule.lr_floor", "schedule.lr_milestones", "schedule.lr_gamma"),
    *("schedule.lam_warmup", "schedule.mask_lr", "schedule.freeze_masks_at", "data.augment"),
    *("data.crop_scale", "data.crop_ratio", "data.crop_padding", "data.randaugment"),
    *("data.random_erasing", "data.hflip", "data.mixup", "data.cutmix"),
)
_OF_MASKS = ("method.lam", "method.target_density", "method.target_macs", "method.mask_lr")
_FREEZE = "schedule.freeze_masks_at"
RECORD = "continued.jsonl"
# What a run writes when it is finished.
_RESULTS = ("summary.json", "summary.png", "masks.png", "model.safetensors", "layers.csv")


class Places(Protocol):
    """What is needed of the inputs of a run."""

    @property
    def total_steps(self) -> int: ...

    def place(self, step: int) -> int: ...


def check_keys(keys: Sequence[str]) -> None:
    """Raises UsageError for a key that makes another run, and so cannot be changed in one."""
    for key in keys:
        if key not in MAY_CHANGE:
            raise UsageError(
                f"--continue-with {key}: that makes another run; what may change in one is "
                f"{joined(MAY_CHANGE, 'and')}"
            )


def shift_of(start: Checkpoint, steps_per_epoch: int) -> int:
    """`Inputs.shift` of the run that goes on from `start` with `steps_per_epoch`.

    Raises UsageError where epochs have another length from here on, and `start` is within one.
    """
    shift, before = int(start.meta["progress"].get("shift", 0)), start.meta["steps_per_epoch"]
    epochs, within = divmod(start.step - shift, before)
    if steps_per_epoch == before:
        return shift
    if within or start.meta["progress"]["epochs"] != epochs:
        raise UsageError(
            f"--continue-with optim.global_batch_size: {start.path} is within an epoch, and the "
            "batch may change between two: train on to the end of this one (the same command "
            "without the change), or name a checkpoint at the end of one with "
            "--set checkpoint.resume=…"
        )
    return start.step - epochs * steps_per_epoch


def continued(recipe: Recipe, start: Checkpoint, keys: Sequence[str], places: Places) -> Recipe:
    """`recipe` as the run of checkpoint `start` goes on with it, where `keys` may differ.

    `places` are its inputs. Raises UsageError where the keys could not have the effect that is
    asked for.
    """
    saved = start.meta["recipe"]
    before = Schedule.model_validate(saved["schedule"])
    epochs_before, epochs = saved["optim"]["epochs"], recipe.optim.epochs
    method, total = recipe.method, places.total_steps
    # Of all epochs, so many lie behind.
    done = places.place(start.step) / total * epochs
    if done > epochs:
        raise UsageError(
            f"--continue-with optim.epochs={epochs}: {start.path} has {done:.3g} epochs behind it "
            "already"
        )
    if not isinstance(method, SCLMethod):
        if method.name != "dense" and epochs != epochs_before:
            raise UsageError(
                f"--continue-with optim.epochs: method {method.name} follows a schedule over the "
                "whole run, which would begin to undo what it did: train its structure on with "
                f"`scl retrain {recipe.folder} --weights final`"
            )
        return recipe
    of_masks = [key for key in keys if key in _OF_MASKS]
    if before.masks_are_final(done / epochs_before) and not {*of_masks, _FREEZE} & {*keys}:
        # Where they froze, as a share of the new length.
        share = before.freeze_masks_at
        if epochs != epochs_before:
            share *= epochs_before / epochs
        schedule = recipe.schedule.model_copy(update={"freeze_masks_at": share})
        return recipe.model_copy(update={"schedule": schedule})
    changed = {key: (ours, theirs) for key, ours, theirs in differences(saved, recipe)}
    if _FREEZE in changed and _FREEZE not in keys:
        ours, theirs = changed[_FREEZE]
        raise UsageError(
            f"{start.path} belongs to another recipe: {_FREEZE} is {ours} here and {theirs:.4g} "
            f"there; say which it shall be: --continue-with {_FREEZE}={ours}"
        )
    idle = [key for key in of_masks if key in changed]
    if idle and recipe.schedule.masks_are_final(done / epochs):
        at = recipe.schedule.freeze_masks_at * epochs
        raise UsageError(
            f"--continue-with {idle[0]}: masks are final from epoch {at:.3g} on and the run has "
            f"{done:.3g} behind it, so nothing would change: add {_FREEZE}=… (a share of all "
            f"{epochs} epochs), or more optim.epochs"
        )
    return recipe


def is_changed(recipe: Recipe, start: Checkpoint) -> bool:
    """Whether the run of checkpoint `start` goes on with other values than it had so far."""
    return bool(differences(start.meta["recipe"], recipe))


def begin(recipe: Recipe, start: Checkpoint) -> list[str]:
    """Record what changes, and keep the results of the run so far; returns what to say of it.

    For rank 0, once the folder is its own. Nothing is done where nothing changes: where the run
    has gone on with these values before.
    """
    changes = {
        key: {"from": theirs, "to": ours}
        for key, ours, theirs in differences(start.meta["recipe"], recipe)
    }
    if not changes:
        return []
    _record(recipe.folder / RECORD, start.step, changes)
    kept = _keep_results(recipe.folder, start.step)
    said = [
        f"continues with {key} {_shown(both['to'])} instead of {_shown(both['from'])}"
        for key, both in changes.items()
    ]
    return [*said, *([f"its results so far are kept in {kept}"] if kept else [])]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else written(value)


def _record(path: Path, step: int, changes: dict[str, Any]) -> None:
    """A line for a change; none for one that an interrupted start has noted already."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    last = json.loads(lines[-1]) if lines else {}
    if (last.get("step"), last.get("changed")) == (step, json.loads(json.dumps(changes))):
        return
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    lines.append(json.dumps({"time": now, "step": step, "changed": changes}, ensure_ascii=False))
    atomic_write(path, "".join(f"{line}\n" for line in lines))


def _keep_results(folder: Path, step: int) -> Path | None:
    """Move what a finished run has written aside: it is not the result of what comes now."""
    present = [folder / name for name in _RESULTS if (folder / name).exists()]
    if not present:
        return None
    place = folder / f"before-step-{step:08d}"
    place.mkdir(exist_ok=True)
    for path in present:
        path.replace(place / path.name)
    return place
