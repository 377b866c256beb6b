"""How a run is shown while it goes on: bars on a terminal, lines of plain text everywhere else."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import TextIO

from tqdm import tqdm

from launcher.terminal import is_plain

# A log of thousands of lines helps nobody: of short intervals, not each gets a line.
SECONDS_BETWEEN_LINES = 30.0

# A narrow terminal cuts the line off at its end: what matters most stands first.
_BAR = "{desc} |{bar:5}| {n_fmt}/{total_fmt}{postfix}"


class Display:
    """What one run shows on `stream` (default: stderr). For rank 0 alone.

    On a terminal, a bar per epoch. Under Slurm or CI, or where there is no terminal, plain lines
    without a control character: one for each logged interval, but no more than one in
    `SECONDS_BETWEEN_LINES`. One line for each epoch in any case.
    """

    def __init__(
        self, epochs: int, steps_per_epoch: int, *, done: int = 0, stream: TextIO | None = None
    ) -> None:
        self._stream = stream or sys.stderr
        self.is_plain = is_plain(self._stream)
        self._epochs, self._steps_per_epoch = epochs, steps_per_epoch
        self._done, self._step, self._epoch = done, done, 0
        self._began = time.monotonic()
        self._said_at = self._began
        self._bar: tqdm | None = None

    def start_epoch(self, epoch: int, done: int) -> None:
        """`epoch` counts from 0; `done` of its steps were made by an earlier start."""
        self._epoch = epoch
        if not self.is_plain:
            self._bar = tqdm(
                total=self._steps_per_epoch,
                initial=done,
                desc=f"epoch {epoch + 1}/{self._epochs}",
                unit="step",
                leave=False,
                file=self._stream,
                dynamic_ncols=True,
                bar_format=_BAR,
            )

    def step(self) -> None:
        self._step += 1
        if self._bar is not None:
            self._bar.update()

    def interval(self, series: Mapping[str, float]) -> None:
        """Show the newest numbers; `series` is what has just been logged."""
        if self._bar is not None:
            *numbers, rate = _numbers(series)
            short = " ".join([*numbers, ", ".join(self._left()), rate]).replace("train ", "")
            self._bar.set_postfix_str(" ".join(short.split()), refresh=False)
            return
        now = time.monotonic()
        ends_epoch = self._step % self._steps_per_epoch == 0
        if now - self._said_at < SECONDS_BETWEEN_LINES or ends_epoch:
            return
        self._said_at = now
        of_epoch = self._step - self._epoch * self._steps_per_epoch
        where = f"epoch {self._epoch + 1:>3}/{self._epochs}  step {of_epoch:,}/"
        left = ", ".join(self._left())
        parts = [f"{where}{self._steps_per_epoch:,}", *_numbers(series), left]
        self._say("  ".join(parts))

    def end_epoch(self, series: Mapping[str, float], results: Mapping[str, float]) -> None:
        """One line: `series` is the last interval's, `results` the evaluation's."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._said_at = time.monotonic()
        val = {"val/top1": results["val/top1"]} if "val/top1" in results else {}
        shown = {k: v for k, v in series.items() if k != "train/top1"} | val
        parts = [f"epoch {self._epoch + 1:>3}/{self._epochs}", *_numbers(shown)]
        if self._epoch + 1 < self._epochs:
            parts += [f"{run} left" for run in self._left()[1:]]
        self._say("  ".join(parts))

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _say(self, text: str) -> None:
        # Through tqdm, which draws a bar that is showing anew below the line.
        tqdm.write(text, file=self._stream)
        self._stream.flush()

    def _left(self) -> tuple[str, ...]:
        """Time left of the epoch and of the run, at the mean pace of the updates so far."""
        taken = self._step - self._done
        if not taken:
            return ()
        seconds_each = (time.monotonic() - self._began) / taken
        run = seconds_each * (self._epochs * self._steps_per_epoch - self._step)
        epoch = seconds_each * ((self._epoch + 1) * self._steps_per_epoch - self._step)
        return f"left {_clock(epoch)}", f"run {_clock(run)}"


def _numbers(series: Mapping[str, float]) -> list[str]:
    """The few numbers of `series` that tell how a run goes."""
    forms = {
        "train/loss": "loss {:.3f}",
        "train/top1": "train top-1 {:7.2%}",
        "val/top1": "top-1 {:7.2%}",
        "connections/density": "density {:7.2%}",
        "speed/images_per_s": "{:,.0f} images/s",
    }
    known = {key: series[key] for key in forms if math.isfinite(series.get(key, math.nan))}
    return [forms[key].format(value) for key, value in known.items()]


def _clock(seconds: float) -> str:
    """1:05, from an hour on 2:00:00, from a day on 3 d 04:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d}:{minutes:02d}:{rest:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
