"""What a finished run leaves: the sparse model, budgets per layer, summary, picture, table."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

from torch import nn

from data.files import atomic_write
from data.shards.manifest import Manifest
from launcher.cluster.ranks import average_batch_norm
from launcher.errors import RunError
from launcher.models import create_model
from launcher.reports import report
from launcher.run.inputs import Inputs
from launcher.run.learner import Learner
from launcher.run.progress import Progress
from launcher.terminal import say
from launcher.tracking import Tracker
from sclcore import layer_budgets, weight_uses
from sclcore.export import budgets_csv, save_sparse_model
from sclcore.optim.sparse import SparseOptimizer, hash_masks


@functools.cache
def get_ready() -> None:
    """Import in the background what draws the pictures, so that the end of a run need not wait."""

    def begin() -> None:
        from launcher.reports import mask_picture, picture  # noqa: F401

    threading.Thread(target=begin, name="get ready to draw", daemon=True).start()


def write_results(
    inputs: Inputs, learner: Learner, tracker: Tracker | None, progress: Progress
) -> None:
    """Write everything into the run's folder and show it, on rank 0. Collective.

    Raises RunError if the disk refuses.
    """
    try:
        _write_results(inputs, learner, tracker, progress)
    except OSError as error:
        raise RunError(
            f"the results cannot be written into {inputs.recipe.folder}: {error}; make room there "
            "and give the same command again: it goes on from the newest checkpoint"
        ) from error


def _write_results(
    inputs: Inputs, learner: Learner, tracker: Tracker | None, progress: Progress
) -> None:
    recipe, optimizer = inputs.recipe, learner.optimizer
    folder = recipe.folder
    masks = optimizer.masks() if isinstance(optimizer, SparseOptimizer) else None
    _write_average(inputs, learner, progress)
    model = whole_model(inputs, learner)
    if tracker is None or model is None:
        return
    uses = weight_uses(model, inputs.example)
    budgets = layer_budgets(model, uses, masks)
    live, connections = (sum(getattr(b, key) for b in budgets) for key in ("live", "connections"))
    summary = {
        "name": recipe.name,
        "method": recipe.method.name,
        "top1": progress.results["val/top1"],
        "top5": progress.results["val/top5"],
        "density": live / connections,
        "live": live,
        "connections": connections,
        "macs": sum(b.macs for b in budgets),
        "macs_dense": sum(b.macs_dense for b in budgets),
        "parameters": sum(p.numel() for p in model.parameters()),
        "mask_hash": hash_masks(masks) if masks is not None else None,
        "epochs": progress.epochs,
        "best_top1": progress.best_top1,
        "best_epoch": progress.best_epoch,
        "train_seconds": progress.seconds,
        "world_size": learner.world.world_size,
        "data": inputs.manifest.fingerprint(),
    }
    if learner.average is not None:
        summary["ema_top1"] = progress.results["ema/top1"]
    if progress.stopped_early:
        say(
            f"stopped after {progress.epochs} of {recipe.optim.epochs} epochs: top-1 has not risen "
            f"since epoch {progress.best_epoch} (optim.early_stop_epochs)"
        )
    save_sparse_model(
        model,
        folder / "model.safetensors",
        masks=masks,
        metadata={
            "model": recipe.model.name,
            "density": summary["density"],
            "top1": summary["top1"],
        },
    )
    atomic_write(folder / "layers.csv", budgets_csv(budgets))
    artifacts = {
        "sparse model" if masks else "model": folder / "model.safetensors",
        "metrics": folder / "metrics.jsonl",
        "layers": folder / "layers.csv",
        **({"average": folder / "model_ema.safetensors"} if learner.average else {}),
        "picture": folder / "summary.png",
        "recipe": folder / "recipe.yaml",
        "checkpoints": folder / "checkpoints",
    }
    tracker.summary(summary | {"artifacts": {key: str(path) for key, path in artifacts.items()}})
    # Imported here because rank 0 alone draws: the others need no matplotlib.
    from launcher.reports import mask_picture, picture

    masks_picture = mask_picture.draw(folder)
    picture.draw(folder)
    _give_to_tracker(inputs, tracker, summary, masks_picture)
    report.show(folder)
    _say_how_to_sync(tracker)


def whole_model(inputs: Inputs, learner: Learner) -> nn.Module | None:
    """The network with whole parameters, on rank 0; elsewhere None. Collective.

    In ZeRO stage 3, another one on the CPU, which the engine knows nothing of.
    """
    if learner.parameters.are_whole:
        return learner.model if learner.world.is_main else None
    state = learner.parameters.state()
    if state is None:
        return None
    manifest = inputs.manifest
    model = create_model(
        inputs.recipe.model,
        num_classes=len(manifest.classes),
        in_chans=manifest.image.channels,
    )
    model.load_state_dict(state, assign=True)
    return model


def _write_average(inputs: Inputs, learner: Learner, progress: Progress) -> None:
    """`model_ema.safetensors`, where weights are averaged. Collective."""
    if learner.average is None:
        return
    path = inputs.recipe.folder / "model_ema.safetensors"
    about = {"model": inputs.recipe.model.name, "top1": progress.results.get("ema/top1")}
    with learner.average.in_place():
        average_batch_norm(learner.model)
        if (model := whole_model(inputs, learner)) is not None:
            save_sparse_model(model, path, metadata=about)


def _give_to_tracker(
    inputs: Inputs, tracker: Tracker, summary: dict[str, Any], masks_picture: Path | None
) -> None:
    """Charts, and the model with its report, for those who look at runs in W&B."""
    folder = inputs.recipe.folder
    pictures = [p for p in (folder / "summary.png", masks_picture) if p is not None]
    tracker.charts(pictures)
    report_files = ("model.safetensors", "layers.csv", "recipe.yaml")
    tracker.model(
        [*(folder / name for name in report_files), *pictures],
        metadata=summary,
        data=data_facts(inputs.manifest),
    )


def data_facts(manifest: Manifest) -> dict[str, Any]:
    """The data set as the tracker shows it: name, size and fingerprint."""
    return {
        "dataset": manifest.dataset,
        "samples": manifest.samples,
        "classes": len(manifest.classes),
        "fingerprint": manifest.fingerprint(),
    }


def _say_how_to_sync(tracker: Tracker) -> None:
    command = tracker.sync_command
    if command:
        say(f"W&B run, offline; to upload it: {command}")
