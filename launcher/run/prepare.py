"""All that is known of a run before any rank exists, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from launcher.checkpoints.checkpoint import Checkpoint
from launcher.checkpoints.mirror import bring_newest, newest_there
from launcher.folder.lock import check_writable
from launcher.folder.results import is_finished
from launcher.recipe.recipe import Recipe
from launcher.run.continued import check_keys, continued, is_changed, shift_of
from launcher.run.initial import Initial, read_initial
from launcher.run.inputs import Inputs, find_start, open_inputs
from launcher.run.teacher import read_teacher
from launcher.tracking.tensorboard_run import check_tensorboard


@dataclass(frozen=True)
class Prepared:
    """Inputs, and what training begins with: a checkpoint, or else `initial`."""

    inputs: Inputs
    start: Checkpoint | None
    initial: Initial
    awaited: str | None = None
    """The checkpoint of the mirror that is to be brought here and continued from, where it was not
    to be fetched yet."""

    @property
    def is_finished(self) -> bool:
        """Whether every update is made and the results are written."""
        if self.start is None:
            return False
        recipe = self.inputs.recipe
        done = self.inputs.place(self.start.step) >= self.inputs.total_steps
        if self.start.meta["progress"].get("stopped_early", False):
            # A plateau is the end of the run as it was.
            done = done or not is_changed(recipe, self.start)
        return done and is_finished(recipe.folder)


def prepare(
    recipe: Recipe,
    world_size: int,
    *,
    is_main: bool = True,
    changing: Sequence[str] = (),
    fetch: bool = True,
) -> Prepared:
    """Read and check everything that `world_size` ranks of `recipe` begin with.

    Only rank 0 (`is_main`) reads the checkpoint and the weights; it gives them to the others. Of
    the run that is continued, the keys `changing` may have had other values. Without `fetch` a
    newer checkpoint of the mirror stays there, unread.
    Raises UsageError, DataError or CheckpointError with one sentence.
    """
    check_keys(changing)
    if is_main:
        check_tensorboard(recipe.tracking)
    inputs = open_inputs(recipe, world_size)
    start = awaited = None
    if is_main:
        read_teacher(recipe, inputs.manifest)
        awaited = _see_to_mirror(recipe, fetch=fetch)
    if is_main and awaited is None:
        # Where masks froze in the run so far, which may be another share of the longer one.
        hidden = (*changing, "schedule.freeze_masks_at") if changing else ()
        start = find_start(recipe, inputs.manifest, hidden)
    if start is not None:
        inputs = replace(inputs, shift=shift_of(start, inputs.steps_per_epoch))
        if changing:
            recipe = continued(recipe, start, changing, inputs)
            inputs = replace(inputs, recipe=recipe)
    initial = Initial()
    if is_main and start is None and awaited is None:
        initial = read_initial(recipe, inputs.manifest)
        notes = (*initial.notes, *recipe.method.foreseen(recipe.schedule, inputs.total_steps))
        initial = replace(initial, notes=notes)
    prepared = Prepared(inputs, start, initial, awaited)
    if is_main and not prepared.is_finished:
        check_writable(recipe.folder)
    return prepared


def _see_to_mirror(recipe: Recipe, *, fetch: bool) -> str | None:
    """Bring the newest checkpoint of the mirror here; or say which one that is."""
    if recipe.checkpoint.mirror is None:
        return None
    where = (recipe.folder / "checkpoints", recipe.checkpoint.mirror, recipe.checkpoint.resume)
    if not fetch:
        return newest_there(*where)
    bring_newest(*where)
    return None
