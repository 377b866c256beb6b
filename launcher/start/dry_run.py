"""`scl train --dry-run`: all that can be known of a run before it; nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from data.storage.remote import without_secrets
from launcher.checkpoints.disk_space import in_units
from launcher.folder.results import percent, si
from launcher.models import model_on_meta
from launcher.recipe.recipe import Recipe
from launcher.run.inputs import Inputs
from launcher.run.prepare import Prepared, prepare
from launcher.start.forecast import as_table, forecast_recipe
from launcher.start.needs import Size, State, size_of, state_of
from sclcore.methods.scl import SCLMethod


def dry_run(recipe: Recipe, changing: Sequence[str] = (), *, forecast: bool = False) -> str:
    """Check everything that training would, and say what it would do, as text.

    `forecast` trains for a part of the time besides, in this process, to foretell the density that
    each λ would leave. Raises what `prepare` and `forecast_recipe` do.
    """
    prepared = prepare(recipe, recipe.engine.ranks, changing=changing, fetch=False)
    rows = {key: value for key, value in _rows(prepared) if value}
    width = max(map(len, rows)) + 2
    lines = [f"{key:<{width}}{value}" for key, value in rows.items()]
    lines += ["", *prepared.initial.notes] if prepared.initial.notes else []
    if forecast:
        lines += ["", *as_table(forecast_recipe(recipe))]
    checks = "All checks" if prepared.awaited is None else "All checks but those of that checkpoint"
    return "\n".join([*lines, "", f"{checks} passed; nothing was written."])


def _rows(prepared: Prepared) -> Iterator[tuple[str, str]]:
    inputs = prepared.inputs
    recipe, plan = inputs.recipe, inputs.plan(0)
    size, state = _needs(inputs)
    yield "run", f"{recipe.folder}: {_standing(prepared)}"
    yield (
        "data",
        f"{recipe.data.path}: {plan.samples:,} images to train on, {inputs.val.manifest.samples:,} "
        f"to evaluate, {len(inputs.manifest.classes):,} classes",
    )
    yield (
        "model",
        f"{recipe.model.name}: {size.parameters:,} parameters, {size.connections:,} connections, "
        f"{si(size.macs)} MACs an image",
    )
    yield (
        "batch",
        f"{plan.world_size} rank(s) × {plan.accumulation} × {plan.micro_batch_size} = "
        f"{plan.global_batch_size} images an update",
    )
    left_out = f"; {plan.dropped} images of each are left out" if plan.dropped else ""
    yield (
        "updates",
        f"{recipe.optim.epochs} epochs × {plan.steps_per_epoch} = {inputs.total_steps:,}{left_out}",
    )
    yield "method", _method(inputs)
    per_rank = state.per_rank(recipe.engine.zero_stage, plan.world_size)
    # Counted at 2 bytes a number.
    bytes_each = 1 if recipe.engine.precision in ("autocast", "bf16") else 2
    batch = in_units(bytes_each * size.activations * plan.micro_batch_size)
    on_its_way = f"; about {batch} for a micro-batch on its way" if size.activations else ""
    yield (
        "memory",
        f"{in_units(per_rank)} a rank for weights, gradients and optimizer{on_its_way}",
    )
    kept = recipe.checkpoint.keep + 1 + recipe.checkpoint.keep_pareto
    checkpoint = state.weights + state.optimizer
    yield "disk", f"about {in_units(checkpoint)} a checkpoint, at most {kept} of them"


def _standing(prepared: Prepared) -> str:
    if prepared.awaited is not None:
        mirror = without_secrets(prepared.inputs.recipe.checkpoint.mirror or "")
        return f"continues from {prepared.awaited} of {mirror}, once that is fetched"
    if prepared.is_finished:
        return "finished"
    if prepared.start is None:
        return "new"
    return f"continues at update {prepared.start.step:,}"


def _method(inputs: Inputs) -> str:
    recipe, total = inputs.recipe, inputs.total_steps
    method = recipe.method
    if not isinstance(method, SCLMethod):
        return method.name
    learning = round(recipe.schedule.freeze_masks_at * total)
    aim = f"λ = {method.lam:g}" if method.target is None else _aim(*method.target)
    return f"scl, {aim}; masks learn in the first {learning:,} updates"


def _aim(key: str, share: float) -> str:
    what = "connections" if key == "target_density" else "MACs"
    return f"held, in the end, to {percent(share)} of the {what}"


def _needs(inputs: Inputs) -> tuple[Size, State]:
    recipe, manifest = inputs.recipe, inputs.manifest
    model, image = model_on_meta(
        recipe.model,
        num_classes=len(manifest.classes),
        in_chans=manifest.image.channels,
        image_size=recipe.data.image_size,
    )
    return size_of(model, image), state_of(inputs.method, recipe.optim, model, image)
