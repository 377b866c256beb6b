"""What a run is made from; what is sure to fail is refused here, before any process or file."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.shards.manifest import Manifest
from data.stream.pipeline import ShardDataset, open_split, train_stream
from data.stream.plan import MIXED, ORDER, BatchPlan, check_feasible
from launcher.checkpoints import checkpoint
from launcher.checkpoints.checkpoint import Checkpoint
from launcher.checkpoints.disk_space import shortage
from launcher.checkpoints.manifest import folders
from launcher.errors import UsageError
from launcher.models import check_training, model_on_meta
from launcher.recipe.engine import accumulation_steps
from launcher.recipe.kinds import written
from launcher.recipe.model import CUT_FILE
from launcher.recipe.recipe import NOT_SET, Recipe, differences, resume_difference
from launcher.run.continued import MAY_CHANGE
from launcher.run.fast import check_fast
from launcher.run.optimizer import build_optimizer
from launcher.run.target import controller_of
from launcher.run.unpacked import check_is_packed
from sclcore.driver.method import Method


@dataclass(frozen=True)
class Inputs:
    """The recipe of a run, its data, and how the ranks share them."""

    recipe: Recipe
    train: ShardDataset
    val: ShardDataset
    world_size: int
    accumulation: int
    order: int = ORDER
    """How the samples of an epoch are ordered and dealt (`data.stream.plan`)."""
    places: tuple[int, ...] = ()
    """Which part of a batch each rank reads; () for as they are numbered."""
    shift: int = 0
    """Of a run whose batch was changed between two epochs: the updates that it has made up to then,
    less those that as many epochs have at the present size. Place = update - shift."""

    @property
    def manifest(self) -> Manifest:
        return self.train.manifest

    @property
    def steps_per_epoch(self) -> int:
        """Updates in an epoch, whatever the ranks."""
        return self.plan(0).steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Updates in the whole run, had it this batch size from the beginning: places."""
        return self.steps_per_epoch * self.recipe.optim.epochs

    def place(self, step: int) -> int:
        """Update `step` as one of `total_steps`; position in every schedule follows from it."""
        return step - self.shift

    def epoch_at(self, step: int) -> float:
        """The epochs that lie behind after `step` updates."""
        return self.place(step) / self.steps_per_epoch

    @property
    def method(self) -> Method:
        """The recipe's, with what follows from the length of the run."""
        return self.recipe.method.for_run(self.recipe.schedule, self.total_steps)

    @property
    def example(self) -> Tensor:
        """One input of the model, for its shape alone."""
        size = self.recipe.data.image_size
        return torch.empty(1, self.manifest.image.channels, size, size)

    def plan(self, rank: int) -> BatchPlan:
        """Which samples `rank` reads when."""
        return BatchPlan(
            shard_sizes=self.train.shard_sizes,
            seed=self.recipe.seed,
            global_batch_size=self.recipe.optim.global_batch_size,
            world_size=self.world_size,
            rank=self.places[rank] if self.places else rank,
            accumulation=self.accumulation,
            order=self.order,
        )

    def dealt(self, start: Checkpoint | None, places: list[int]) -> Inputs:
        """These, in the order that the run began with, and with the ranks in `places`."""
        order = ORDER if start is None else start.meta.get("order", MIXED)
        return replace(self, order=order, places=tuple(places))

    def batches(self, rank: int, step: int) -> Iterator[dict[str, Tensor]]:
        """The micro-batches of `rank` from update `step` to the end of the run."""
        epoch, start_step = divmod(self.place(step), self.steps_per_epoch)
        return train_stream(
            self.train,
            self.plan(rank),
            self.recipe.data,
            start_epoch=epoch,
            start_step=start_step,
            epochs=self.recipe.optim.epochs,
        )


def open_inputs(recipe: Recipe, world_size: int) -> Inputs:
    """Open both splits and check that `world_size` ranks can be fed and the model takes the images.

    Raises UsageError or DataError with one sentence.
    """
    accumulation = accumulation_steps(
        recipe.optim.global_batch_size, world_size, recipe.engine.max_micro_batch
    )
    check_is_packed(str(recipe.data.path))
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
    inputs = Inputs(recipe, train, val, world_size, accumulation)
    _check_model(inputs)
    return inputs


def _check_model(inputs: Inputs) -> None:
    """Build model and optimizer on the meta device, which shows what does not fit together."""
    recipe, manifest = inputs.recipe, inputs.manifest
    model, image = model_on_meta(
        recipe.model,
        num_classes=len(manifest.classes),
        in_chans=manifest.image.channels,
        image_size=recipe.data.image_size,
    )
    _check_smallest_images(recipe, manifest)
    micro_batch = inputs.plan(0).micro_batch_size
    check_training(model, recipe.model, image, micro_batch, len(manifest.classes))
    optimizer = build_optimizer(inputs.method, recipe.optim, model, image)
    controller_of(recipe, model, optimizer, image, inputs.total_steps)
    check_fast(recipe.engine, model, image, recipe.model.name)
    _check_room(recipe, sum(p.numel() for p in model.parameters()))


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


def find_start(
    recipe: Recipe, manifest: Manifest, changing: Collection[str] = ()
) -> Checkpoint | None:
    """The checkpoint a run continues from; None for a new run.

    It may have other values of the keys `changing`. Raises UsageError when it belongs to another
    recipe or other data, CheckpointError when what there is cannot be used.
    """
    root = recipe.folder / "checkpoints"
    start = checkpoint.resolve(root, recipe.checkpoint.resume)
    if start is None:
        if changing:
            raise UsageError(
                f"--continue-with: {recipe.folder} holds no run that could be continued; begin it "
                "with --set"
            )
        return None
    for key, ours, _ in differences(start.meta["recipe"], recipe):
        if key not in changing:
            on_purpose = ""
            if key in MAY_CHANGE and ours != NOT_SET:
                on_purpose = f"go on with this one by --continue-with {key}={written(ours)}, "
            raise UsageError(
                f"{start.path} belongs to another recipe: "
                f"{resume_difference(start.meta['recipe'], recipe, changing)}; {on_purpose}take "
                "its recipe, or choose another run_dir, to begin anew or, with init.weights="
                f"{recipe.folder}, from its weights"
            )
    _check_cut(recipe)
    if start.meta["data"] != manifest.fingerprint():
        raise UsageError(
            f"{start.path} was trained on other data than {recipe.data.path}: the manifests "
            "differ; point data.path at the former shards, or choose another run_dir"
        )
    return start


def _check_cut(recipe: Recipe) -> None:
    """UsageError where the file that `model.cut` names is not what the run began with."""
    own, named = recipe.folder / CUT_FILE, recipe.model.cut
    if named is not None and own.is_file() and own.read_bytes() != named.read_bytes():
        raise UsageError(
            f"model.cut: {named} has changed since {recipe.folder} began with it (its copy is "
            f"{own}): restore it, or choose another run_dir"
        )
