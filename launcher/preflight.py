"""Everything that can be known to fail is made to fail here, before a process or file exists."""

from __future__ import annotations

from dataclasses import dataclass

from data.manifest import Manifest
from data.pipeline import ShardDataset, open_split
from data.plan import BatchPlan, check_feasible
from launcher import checkpoint
from launcher.checkpoint import Checkpoint
from launcher.engine import accumulation_steps
from launcher.errors import UsageError
from launcher.models import model_on_meta
from launcher.recipe import Recipe, resume_difference


@dataclass(frozen=True)
class Inputs:
    """The data of a run and how its ranks share it."""

    train: ShardDataset
    val: ShardDataset
    accumulation: int

    @property
    def manifest(self) -> Manifest:
        return self.train.manifest

    def plan(self, recipe: Recipe, world_size: int, rank: int) -> BatchPlan:
        return BatchPlan(
            shard_sizes=self.train.shard_sizes,
            seed=recipe.seed,
            global_batch_size=recipe.optim.global_batch_size,
            world_size=world_size,
            rank=rank,
            accumulation=self.accumulation,
        )


def open_inputs(recipe: Recipe, world_size: int) -> Inputs:
    """Open both splits and check that `world_size` ranks can be fed and the model takes the images.

    Raises UsageError or DataError with one sentence.
    """
    accumulation = accumulation_steps(
        recipe.optim.global_batch_size, world_size, recipe.engine.max_micro_batch
    )
    train, val = (open_split(recipe.data, split) for split in ("train", "val"))
    if train.manifest.classes != val.manifest.classes:
        raise UsageError(
            f"{recipe.data.path}: train and val have different classes "
            f"({len(train.manifest.classes)} and {len(val.manifest.classes)}); pack them together"
        )
    check_feasible(
        train.manifest.samples,
        recipe.optim.global_batch_size,
        world_size,
        accumulation,
        recipe.data.workers,
    )
    model, image = model_on_meta(
        recipe.model,
        num_classes=len(train.manifest.classes),
        in_chans=train.manifest.image.channels,
        image_size=recipe.data.image_size,
    )
    # Its patterns of layers can only be checked against the model.
    recipe.method.optimizer(model, recipe.optim, image)
    return Inputs(train, val, accumulation)


def find_start(recipe: Recipe, manifest: Manifest) -> Checkpoint | None:
    """The checkpoint a run continues from; None for a new run.

    Raises UsageError when it belongs to another recipe or other data, CheckpointError when what
    there is cannot be used.
    """
    found = checkpoint.resolve(recipe.folder / "checkpoints", recipe.checkpoint.resume)
    if found is None:
        return None
    difference = resume_difference(found.meta["recipe"], recipe)
    if difference:
        raise UsageError(
            f"{found.path} belongs to another recipe: {difference}; take its recipe, another "
            "run_dir, or remove the folder to start anew"
        )
    if found.meta["data"] != manifest.fingerprint():
        raise UsageError(
            f"{found.path} was trained on other data than {recipe.data.path}: the manifests "
            "differ; point data.path at the former shards, or choose another run_dir"
        )
    return found
