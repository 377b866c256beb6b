"""Everything that can be known to fail is made to fail here, before a process or file exists."""

from __future__ import annotations

from dataclasses import dataclass

from data.shards.manifest import Manifest
from data.stream.pipeline import ShardDataset, open_split
from data.stream.plan import BatchPlan, check_feasible
from launcher.checkpoints import checkpoint
from launcher.checkpoints.checkpoint import Checkpoint
from launcher.checkpoints.disk_space import shortage
from launcher.checkpoints.manifest import folders
from launcher.engine import accumulation_steps
from launcher.errors import UsageError
from launcher.models import model_on_meta
from launcher.recipe import Recipe, resume_difference
from launcher.target import controller_of


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
    if recipe.data.mixing:
        _check_pairs(recipe, world_size, accumulation)
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
    _check_smallest_images(recipe, train.manifest)
    # Its patterns of layers can only be checked against the model.
    optimizer = recipe.method.optimizer(model, recipe.optim, image)
    updates = train.manifest.samples // recipe.optim.global_batch_size * recipe.optim.epochs
    controller_of(recipe, model, optimizer, image, updates)
    _check_room(recipe, sum(p.numel() for p in model.parameters()))
    return Inputs(train, val, accumulation)


def _check_room(recipe: Recipe, parameters: int) -> None:
    """Refuse a new run whose first checkpoint cannot fit; later ones are checked as they come."""
    folder = recipe.folder / "checkpoints"
    if folders(folder):
        return
    # Weights and a momentum in float32 at the least; masks and their momentum may be as much again.
    if lack := shortage(folder, 8 * parameters):
        raise UsageError(
            f"the first checkpoint would not fit into {recipe.folder}: {lack}; make room, or "
            "choose another place with --set run_dir=…"
        )


def _check_pairs(recipe: Recipe, world_size: int, accumulation: int) -> None:
    """Refuse micro-batches that would part a pair that mixup or CutMix mixes."""
    batch = recipe.optim.global_batch_size
    per_rank = batch // world_size
    micro_batch = per_rank // accumulation
    if micro_batch % 2 == 0:
        return
    unit = 2 * world_size
    sizes = [size for size in (batch // unit * unit, (batch // unit + 1) * unit) if size]
    fix = f"choose optim.global_batch_size {' or '.join(map(str, sizes))}"
    if per_rank % 2 == 0:
        even = [size for size in range(2, per_rank + 1, 2) if per_rank % size == 0]
        nearest = min(even, key=lambda size: abs(size - recipe.engine.max_micro_batch))
        fix = f"choose engine.max_micro_batch {nearest}"
    raise UsageError(
        f"data.mixup and data.cutmix mix samples in pairs, but {batch} samples over {world_size} "
        f"rank(s) × {accumulation} make micro-batches of {micro_batch}, which is odd; {fix}"
    )


def _check_smallest_images(recipe: Recipe, manifest: Manifest) -> None:
    if recipe.data.smallest_training_size < recipe.data.image_size:
        model_on_meta(
            recipe.model,
            num_classes=len(manifest.classes),
            in_chans=manifest.image.channels,
            image_size=recipe.data.smallest_training_size,
            key="data.progressive.start",
        )


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
