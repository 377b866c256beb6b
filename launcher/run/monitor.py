"""Watches the loop: sums up each interval, logs it with the tracker, shows how the run goes."""

from __future__ import annotations

import math
import resource
import time
from typing import Any

import torch
from torch import Tensor

from launcher.cluster.ranks import sum_over_ranks
from launcher.errors import RunError
from launcher.run.display import Display
from launcher.run.inputs import Inputs
from launcher.run.learner import Learner
from launcher.run.mask_series import MaskSeries
from launcher.tracking import Tracker


class Monitor:
    """One per rank; `tracker` and what is shown exist on rank 0 only.

    Everything that sums over ranks happens at the same steps on all of them.
    """

    def __init__(
        self, inputs: Inputs, learner: Learner, tracker: Tracker | None, step: int = 0
    ) -> None:
        """`step`: the updates that earlier starts have made."""
        self._tracker = tracker
        recipe = inputs.recipe
        self._device = learner.device
        self._inputs = inputs
        self._steps_per_epoch = inputs.steps_per_epoch
        self._log_every = recipe.tracking.log_every
        self._samples = inputs.manifest.samples
        self._max_corrupt_fraction = recipe.data.max_corrupt_fraction
        self._masks = MaskSeries(inputs, learner)
        self._display = None
        if tracker is not None:
            done = inputs.place(step)
            self._display = Display(recipe.optim.epochs, self._steps_per_epoch, done=done)
        self._last: dict[str, float] = {}
        self._seen = 0.0
        self._corrupt = 0.0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self._start_interval()

    def state(self) -> dict[str, Any]:
        """What this rank has summed up since the last line, and counted since the run began.

        Tensors are those in use, not copies.
        """
        self._add_up()
        return {
            "sums": [*self._sums],
            "steps": self._steps,
            "elapsed": time.perf_counter() - self._since if self._steps else 0.0,
            "data_wait": self._data_wait,
            "masks": self._masks.state(),
            "seen": self._seen,
            "corrupt": self._corrupt,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Undo `state`; without its "sums", the next line is about the updates from here on."""
        # Checkpoints from before there was a top-5 have shorter sums.
        if len(state.get("sums", ())) == len(self._sums):
            self._sums, self._steps = [*state["sums"]], state["steps"]
            self._since = time.perf_counter() - state["elapsed"]
            self._data_wait = state["data_wait"]
            self._masks.restore(state["masks"])
        else:
            self._masks.restore(None)
        self._seen, self._corrupt = state["seen"], state["corrupt"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]

    def before_step(self, step: int) -> None:
        """Observe the masks at the step that is about to be logged."""
        self._masks.before_step(logged=self._logs_at(step))

    def after_micro_batch(self, loss: Tensor, logits: Tensor, batch: dict[str, Tensor]) -> None:
        """Add to the interval's sums without waiting for the device.

        A mixed sample counts by its own label, whatever its share of the image.
        """
        labels = batch["label"]
        best = logits.detach().topk(min(5, logits.shape[1])).indices
        self._pending.append((loss.detach(), best, labels, batch["corrupt"]))

    def _add_up(self) -> None:
        """Add what is pending to the sums: batch by batch, so in the same order at any time."""
        if not self._pending:
            return
        losses, best, labels, corrupt = zip(*self._pending, strict=True)
        hits = torch.cat(best) == torch.cat(labels)[:, None]
        counts = torch.stack([hits[:, 0].sum(), hits.sum(), torch.cat(corrupt).sum()])
        sizes = [labels.numel() for labels in labels]
        for loss, size in zip(torch.stack(losses).tolist(), sizes, strict=True):
            self._sums[0] += loss * size
        for place, count in enumerate([*counts.tolist(), sum(sizes)], start=1):
            self._sums[place] += count
        self._pending.clear()

    def after_step(self, step: int, *, grad_norm: float, data_wait: float) -> None:
        """`step` counts from 1 here: the number of updates tried so far. Collective when it logs.

        Raises RunError when more samples were corrupt than the recipe allows.
        """
        self._data_wait += data_wait
        self._steps += 1
        skipped = not math.isfinite(grad_norm)
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self._masks.after_step()
        if self._display is not None:
            self._display.step()
        if self._logs_at(step - 1):
            self._log_interval(step, grad_norm)

    def start_epoch(self, epoch: int, done: int) -> None:
        """A progress bar for the epoch, of which earlier starts have made `done` steps."""
        if not self._steps:
            # Evaluation and saving, which came before, are not time spent on updates.
            self._since = time.perf_counter()
        if self._display is not None:
            self._display.start_epoch(epoch, done)

    def end_epoch(self, epoch: int, step: int, results: dict[str, float]) -> None:
        """Log the evaluation and say in one line how the epoch went. Collective."""
        series = self._masks.epoch()
        if self._tracker is None or self._display is None:
            return
        self._tracker.log(results | series, step=step, epoch=self._inputs.epoch_at(step))
        self._display.end_epoch(self._last, results)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._display is not None:
            self._display.close()

    def _logs_at(self, step: int) -> bool:
        ends_epoch = self._inputs.place(step + 1) % self._steps_per_epoch == 0
        return ends_epoch or (step + 1) % self._log_every == 0

    def _start_interval(self) -> None:
        self._sums = [0.0] * 5
        """Loss, correct among the best 1 and 5, corrupt, samples."""
        self._pending: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._steps = 0
        self._data_wait = 0.0
        self._since = time.perf_counter()

    def _log_interval(self, step: int, grad_norm: float) -> None:
        self._add_up()
        totals = torch.tensor(self._sums, dtype=torch.float64, device=self._device)
        loss, top1, top5, corrupt, count = sum_over_ranks(totals).tolist()
        elapsed = time.perf_counter() - self._since
        self._seen += count
        self._corrupt += corrupt
        of_masks = self._masks.line(step)
        if self._tracker is not None and self._display is not None:
            self._last = {
                "train/loss": loss / count,
                "train/top1": top1 / count,
                "train/top5": top5 / count,
                "train/grad_norm": grad_norm,
                "train/skipped_steps": float(self.skipped),
                "data/corrupt": self._corrupt,
                "speed/images_per_s": count / elapsed,
                "speed/step_s": elapsed / self._steps,
                "speed/data_wait": self._data_wait / elapsed,
                "speed/memory_gib": _memory_gib(self._device),
                **of_masks,
            }
            self._tracker.log(self._last, step=step, epoch=self._inputs.epoch_at(step))
            self._display.interval(self._last)
        self._start_interval()
        self._check_corrupt()

    def _check_corrupt(self) -> None:
        # At the beginning one bad sample would be a large share of the few seen.
        share = self._corrupt / max(self._seen, self._samples)
        if share > self._max_corrupt_fraction:
            raise RunError(
                f"{self._corrupt:.0f} samples could not be decoded, {share:.2%} of those read; "
                f"data.max_corrupt_fraction allows {self._max_corrupt_fraction:.2%}. The log names "
                "each shard and key; allow more, and the same command goes on from the last "
                "checkpoint, or pack the data again for a run in another run_dir"
            )


def _memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
