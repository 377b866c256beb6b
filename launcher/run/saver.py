"""Saves a run while it goes on: a copy in memory, threads that write it, and rank 0 to publish it.

A save has three stages, and all ranks are in the same one because they move on together, at the
message they exchange before each step anyway:

    snapshot   each rank copies what it holds to CPU memory; the only stage that training waits for
    parts      a thread of each rank writes its copy into one temporary folder and syncs it
    publish    a thread of rank 0 adds the manifest, renames the folder, retires old checkpoints

No thread takes part in a collective. A rank whose disk refuses says why in the message after it,
never through the disk.
"""

from __future__ import annotations

import copy
import logging
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from launcher.checkpoints.manifest import CheckpointError, Evaluation, Manifest, Written
from launcher.checkpoints.mirror import Mirror
from launcher.checkpoints.saved_optimizer import layout_of, optimizer_part
from launcher.checkpoints.write import discard, open_folder, publish, write_parts, writing_thread
from launcher.cluster.ranks import Agreed, Agreement
from launcher.errors import RunError
from launcher.folder.provenance import environment
from launcher.run.course import Course
from launcher.run.inputs import Inputs
from launcher.run.learner import Learner
from launcher.run.monitor import Monitor
from launcher.run.progress import Progress
from launcher.run.state import bytes_of, check_masks_agree, copied_to_cpu, parts_of, rank_part
from launcher.tracking import Tracker

# At the end of a run, while the other ranks wait: below any time-out of theirs.
_MIRRORED_WITHIN_S = 120
_log = logging.getLogger("scl.checkpoint")


class Saver:
    """Writes checkpoints in the background; every public method is collective."""

    def __init__(
        self,
        inputs: Inputs,
        learner: Learner,
        course: Course,
        tracker: Tracker | None,
        agreement: Agreement,
        monitor: Monitor,
    ) -> None:
        self.folder = inputs.recipe.folder / "checkpoints"
        self._inputs, self._learner, self._course = inputs, learner, course
        self._tracker = tracker
        self._agreement = agreement
        self._monitor = monitor
        self._config = inputs.recipe.checkpoint
        self._environment = environment(learner.world)
        self._thread = writing_thread()
        self._mirror = self._open_mirror()
        self._task: Future[Any] | None = None
        self._manifest: Manifest | None = None
        self._temporary = Path()
        self._pieces: dict[str, Any] = {}
        self._saved_step: int | None = None
        self._saved_at = time.monotonic()
        self._failure: str | None = None

    def _open_mirror(self) -> Mirror | None:
        """What copies checkpoints elsewhere, on rank 0; at once what the last start left behind."""
        config = self._config
        if config.mirror is None or not self._learner.world.is_main:
            return None
        mirror = Mirror(
            self.folder, config.mirror, keep=config.keep, keep_pareto=config.keep_pareto
        )
        mirror.copy_soon()
        return mirror

    def before_step(self, progress: Progress) -> int | None:
        """Agree with the other ranks what is next; returns the signal to stop by, if one came.

        Moves the save under way on, and begins one where the recipe wants it within an epoch.
        """
        due = self._is_due(progress.step)
        agreed = self._agreement.at_step(writing=self._writing, save=due)
        self._go_on(agreed)
        if agreed.save and not agreed.signal:
            self.save(progress)
        return agreed.signal

    def save(self, progress: Progress) -> None:
        """Begin to save the present state once the last save is done; does not wait for the disk.

        A disk that refuses is a warning here: the next save tries again, and `finish` tells.
        Raises RunError on all ranks when their masks differ.
        """
        self._saved_at = time.monotonic()
        if self._saved_step == progress.step:
            return
        self.wait()
        check_masks_agree(self._learner)
        if self._tracker is not None:
            # What a resumed run does not log again must be on disk by then.
            self._tracker.flush()
        parts = parts_of(self._learner)
        parts[rank_part(self._learner.world.rank)]["monitor"] = self._monitor.state()
        self._manifest = self._describe(progress)
        place = self._open_folder(bytes_of(parts))
        if isinstance(place, str):
            self._note(place)
            return
        self._temporary = place
        self._pieces = layout_of(parts.get(optimizer_part(self._learner.world.rank), {}))
        self._saved_step = progress.step
        self._task = self._thread.submit(write_parts, place, copied_to_cpu(parts))

    def finish(self) -> None:
        """Wait for the write under way. Raises RunError if the newest state could not be saved."""
        self.wait()
        if self._mirror is not None:
            self._mirror.close(_MIRRORED_WITHIN_S)
        if self._failure:
            raise RunError(self._failure)

    def wait(self) -> None:
        """Wait until nothing is being written any more."""
        while self._task is not None:
            self._go_on(self._agreement.at_step(writing=self._writing))
            if self._writing:
                time.sleep(0.01)

    @property
    def _writing(self) -> bool:
        """Whether a thread of this rank is at work."""
        return self._task is not None and not self._task.done()

    def _is_due(self, step: int) -> bool:
        """Whether the recipe wants a checkpoint now, within an epoch."""
        every, minutes = self._config.every_steps, self._config.every_minutes
        if every and step and step % every == 0 and step != self._saved_step:
            return True
        # Rank 0's clock decides: those of the ranks differ.
        old = time.monotonic() - self._saved_at
        return bool(minutes and self._learner.world.is_main and old > 60 * minutes)

    def _go_on(self, agreed: Agreed) -> None:
        """Move on to the next stage, if all ranks are through with the one before."""
        if self._task is None or agreed.writing:
            return
        if self._temporary != Path():
            reports = self._agreement.gather_to_main(self._report())
            # On the other ranks `_publish` has nothing to do: they learn from rank 0 how it ended.
            self._task = self._thread.submit(self._publish, self._temporary, reports)
            self._temporary = Path()
            return
        error = self._task.exception()
        self._task = None
        self._note(self._agreement.from_main(str(error) if error else None))

    def _open_folder(self, own_bytes: int) -> Path | str:
        """A temporary folder for all ranks' parts, or why there is none. Collective."""
        assert self._manifest is not None
        sizes = self._agreement.gather_to_main(own_bytes)
        place: Path | str | None = None
        if sizes is not None:
            try:
                place = open_folder(self.folder, self._manifest.step, sum(sizes))
            except (OSError, CheckpointError) as error:
                place = str(error)
        return self._agreement.from_main(place)

    def _report(self) -> dict[str, Any]:
        """What became of this rank's parts."""
        assert self._task is not None
        if error := self._task.exception():
            return {"error": str(error)}
        return {"files": self._task.result(), "pieces": self._pieces}

    def _publish(self, folder: Path, reports: list[dict[str, Any]] | None) -> None:
        """On rank 0, with every rank's report; raises what keeps the parts from being published."""
        if reports is None:
            return
        assert self._manifest is not None
        files: dict[str, Written] = {}
        pieces: dict[str, Any] = {}
        try:
            for rank, report in enumerate(reports):
                if "error" in report:
                    raise CheckpointError(f"rank {rank}: {report['error']}")
                files |= report["files"]
                if report["pieces"]:
                    pieces[optimizer_part(rank)] = report["pieces"]
            self._manifest.files = files
            self._manifest.meta["optimizer"]["pieces"] = pieces
            publish(
                self.folder,
                folder,
                self._manifest,
                keep=self._config.keep,
                keep_pareto=self._config.keep_pareto,
            )
        except BaseException:
            discard(folder)
            raise

    def _note(self, problem: str | None) -> None:
        """Remember how the save ended, the same on all ranks; rank 0 says so if it failed."""
        self._failure = None
        if problem is None:
            if self._mirror is not None:
                self._mirror.copy_soon()
            return
        assert self._manifest is not None
        self._saved_step = None
        self._failure = (
            f"the state after step {self._manifest.step:,} could not be saved: {problem}; what was "
            f"saved before is untouched. Make room (`scl checkpoint prune "
            f"{self._inputs.recipe.folder}`, a smaller checkpoint.keep) or continue in another "
            "run_dir"
        )
        if self._learner.world.is_main:
            _log.warning("%s; training goes on and the next save tries again", self._failure)

    def _describe(self, progress: Progress) -> Manifest:
        """The manifest, but for what is known only when all parts are written. Collective."""
        inputs, learner = self._inputs, self._learner
        meta = {
            "progress": copy.deepcopy(vars(progress)),
            "recipe": inputs.recipe.as_dict(),
            "data": inputs.manifest.fingerprint(),
            "order": inputs.order,
            "steps_per_epoch": inputs.steps_per_epoch,
            "samples": inputs.place(progress.step) * inputs.recipe.optim.global_batch_size,
            "environment": self._environment,
            "optimizer": {"updates": learner.optimizer_state.updates},
        }
        place = inputs.place(progress.step)
        is_evaluated = place == progress.epochs * inputs.steps_per_epoch
        evaluation = None
        if progress.step and is_evaluated:
            live, connections = learner.count_connections()
            evaluation = Evaluation(
                top1=progress.results["val/top1"],
                live=live,
                connections=connections,
                final=self._course.masks_are_final(progress.step),
            )
        return Manifest(step=progress.step, meta=meta, evaluation=evaluation, files={})
