"""Watches the loop: sums over an interval, series for the tracker, warnings, progress bars."""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from launcher.errors import RunError
from launcher.ranks import sum_over_ranks
from launcher.session import Session
from launcher.tracking import Tracker
from sclcore import SCL
from sclcore.telemetry import MaskHealth, observation_metrics, snapshot

_log = logging.getLogger("scl")


class Monitor:
    """One per rank; `tracker` and the progress bar exist on rank 0 only.

    Everything that sums over ranks happens at the same steps on all of them.
    """

    def __init__(self, session: Session, tracker: Tracker | None) -> None:
        self._optimizer = session.optimizer
        self._tracker = tracker
        self._device = session.device
        self._epochs = session.recipe.optim.epochs
        self._total_steps = session.total_steps
        self._steps_per_epoch = session.plan.steps_per_epoch
        self._log_every = session.recipe.tracking.log_every
        self._samples = session.plan.samples
        self._max_corrupt_fraction = session.recipe.data.max_corrupt_fraction
        self._health = MaskHealth(session.recipe.schedule.freeze_masks_at)
        self._bar: tqdm | None = None
        self._held: set[str] = set()
        self._seen = 0.0
        self._corrupt = 0.0
        self._last_loss = math.nan
        self._rate = 0.0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self._start_interval()

    def state(self) -> dict[str, Any]:
        """What this rank has summed up since the last line, and counted since the run began.

        The tensor is the monitor's own, not a copy.
        """
        return {
            "sums": self._sums,
            "count": self._count,
            "held": sorted(self._held),
            "seen": self._seen,
            "corrupt": self._corrupt,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Undo `state`; without its "sums", the next line is about the updates from here on."""
        if "sums" in state:
            self._sums.copy_(state["sums"])
            self._count = state["count"]
            self._held = set(state["held"])
        self._seen, self._corrupt = state["seen"], state["corrupt"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]

    def before_step(self, step: int) -> None:
        """Observe the masks at the step that is about to be logged."""
        if isinstance(self._optimizer, SCL):
            self._optimizer.observing = self._logs_at(step)
            self._optimizer.observations = {}

    def after_micro_batch(self, loss: Tensor, logits: Tensor, batch: dict[str, Tensor]) -> None:
        """Add to the interval's sums without waiting for the device.

        Of a mixed sample, the label that counts is its own, whatever its share of the image.
        """
        labels = batch["label"]
        count = labels.numel()
        correct = (logits.detach().argmax(1) == labels).sum()
        corrupt = batch["corrupt"].sum()
        self._sums += torch.stack(
            [loss.detach().double() * count, correct.double(), corrupt.double()]
        )
        self._count += count

    def after_step(self, step: int, *, grad_norm: float, data_wait: float) -> None:
        """`step` counts from 1 here: the number of updates tried so far. Collective when it logs.

        Raises RunError when more samples were corrupt than the recipe allows.
        """
        self._data_wait += data_wait
        skipped = not math.isfinite(grad_norm)
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if isinstance(self._optimizer, SCL):
            self._held.update(self._optimizer.held_layers)
        if self._bar is not None:
            self._bar.update()
        if self._logs_at(step - 1):
            self._log_interval(step, grad_norm)

    def start_epoch(self, epoch: int, done: int) -> None:
        """A progress bar for the epoch, of which `done` steps are already behind."""
        if self._tracker is not None:
            self._bar = tqdm(
                total=self._steps_per_epoch,
                initial=done,
                desc=f"epoch {epoch + 1}/{self._epochs}",
                unit="step",
                leave=False,
                disable=not sys.stderr.isatty(),
            )

    def end_epoch(self, epoch: int, step: int, results: dict[str, float]) -> None:
        """Log the evaluation and say in one line how the epoch went. Collective."""
        shot = snapshot(self._optimizer) if isinstance(self._optimizer, SCL) else None
        if self._tracker is None:
            return
        if self._bar is not None:
            self._bar.close()
        series = dict(results) | (shot.metrics() if shot else {})
        self._tracker.log(series, step=step, epoch=step / self._steps_per_epoch)
        density = f"  density {shot.density:7.2%}" if shot else ""
        tqdm.write(
            f"epoch {epoch + 1:>3}/{self._epochs}  loss {self._last_loss:.3f}  "
            f"top-1 {results['val/top1']:.2%}{density}  {self._rate:,.0f} images/s",
            file=sys.stderr,
        )

    def _logs_at(self, step: int) -> bool:
        return (step + 1) % self._log_every == 0 or (step + 1) % self._steps_per_epoch == 0

    def _start_interval(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        self._count = 0
        self._data_wait = 0.0
        self._since = time.perf_counter()

    def _log_interval(self, step: int, grad_norm: float) -> None:
        totals = torch.cat([self._sums, self._sums.new_tensor([self._count])])
        loss, correct, corrupt, count = sum_over_ranks(totals).tolist()
        elapsed = time.perf_counter() - self._since
        self._seen += count
        self._corrupt += corrupt
        self._last_loss = loss / count
        self._rate = count / elapsed
        optimizer_series = self._optimizer_series(step)
        if self._tracker is not None:
            series = {
                "train/loss": self._last_loss,
                "train/top1": correct / count,
                "train/grad_norm": grad_norm,
                "train/skipped_steps": float(self.skipped),
                "data/corrupt": self._corrupt,
                "speed/images_per_s": self._rate,
                "speed/data_wait": self._data_wait / elapsed,
                "speed/memory_gib": _memory_gib(self._device),
            }
            self._tracker.log(
                series | optimizer_series, step=step, epoch=step / self._steps_per_epoch
            )
            if self._bar is not None:
                self._bar.set_postfix(loss=f"{self._last_loss:.3f}", refresh=False)
        self._held.clear()
        self._start_interval()
        self._check_corrupt()

    def _optimizer_series(self, step: int) -> dict[str, float]:
        optimizer = self._optimizer
        group = optimizer.param_groups[0]
        series = {"lr": float(group["lr"])}
        if not isinstance(optimizer, SCL):
            return series
        series |= {"lam": float(group["lam"]), "mask_lr": float(group["mask_lr"])}
        shot = snapshot(optimizer)
        observed = observation_metrics(optimizer.observations)
        warnings = self._health.check(
            step / self._total_steps,
            shot,
            held_layers=sorted(self._held),
            revivals=observed.get("masks/revivals"),
        )
        for warning in warnings if self._tracker is not None else ():
            _log.warning("%s", warning)
        return series | shot.metrics() | observed

    def _check_corrupt(self) -> None:
        # At the beginning one bad sample would be a large share of the few seen.
        share = self._corrupt / max(self._seen, self._samples)
        if share > self._max_corrupt_fraction:
            raise RunError(
                f"{self._corrupt:.0f} samples could not be decoded, {share:.2%} of those read; "
                f"data.max_corrupt_fraction allows {self._max_corrupt_fraction:.2%}. The log names "
                "each shard and key; pack the data again, or allow more"
            )


def _memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
