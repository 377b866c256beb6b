"""Watches one start of a run from outside, and waits for the moment to strike."""

from __future__ import annotations

import random
import re
import time

from tests.faults.course import STEPS_PER_EPOCH
from tests.faults.faults import Scene
from tests.faults.published import last_record, last_step
from tests.faults.ranks import Ranks

_CONTINUES = re.compile(r"continues at step ([\d,]+) of")
_BEGINS = re.compile(r"rank\(s\) × \d+ × \d+ = batch")


class Watch:
    """Where a start stands, by what it prints and what it adds to metrics.jsonl."""

    def __init__(self, scene: Scene, ranks: Ranks) -> None:
        self._scene, self._ranks = scene, ranks
        self._looked = 0.0
        self.resumed: int | None = None
        """The step at which training began; None until it does."""
        self.recovered_s: float | None = None
        """From the command to the first new line of metrics."""

    def reach(self, phase: str, phases: tuple[str, ...], rng: random.Random) -> str | None:
        """Wait for a moment of `phase`; the phase reached, or None if the run ended before.

        Where the end of the run comes first it is the phase reached, if it is among `phases`.
        """
        limit = time.monotonic() + self._scene.course.limits.start
        if phase == "start-up":
            longest = 16.0 if self._ranks.launcher == "scl train" else 9.0
            strike_at = self._ranks.began + rng.uniform(0.3, longest)
            while time.monotonic() < strike_at:
                if self.look() is None:
                    return None
                if self.resumed is not None:
                    break
                time.sleep(0.02)
            return "start-up" if self.recovered_s is None else "training"
        # A few updates at least: until the second, watchdogs are patient for minutes.
        ahead = rng.randint(6, self._scene.course.total_steps // 10)
        while (at := self.look()) is not None:
            if time.monotonic() > limit:
                raise TimeoutError(f"never got to {phase}:\n{self._ranks.output()[-3000:]}")
            if self.recovered_s is not None:
                assert self.resumed is not None
                # The moments between the last step and the end are another phase.
                if at >= self._scene.course.total_steps and "val/top1" in self._last:
                    if "end" not in phases:
                        time.sleep(0.1)
                        continue
                    time.sleep(rng.uniform(0.0, 0.9))
                    return "end"
                if at >= self.resumed + ahead and self._is(phase):
                    time.sleep(rng.uniform(0.0, 0.02) if phase == "evaluation" else 0.0)
                    return phase
            time.sleep(0.001 if self.recovered_s is not None else 0.02)
        return None

    def look(self) -> int | None:
        """The last step in metrics.jsonl; None once the processes that were started are gone."""
        self._last = last_record(self._scene.run)
        now = time.monotonic()
        if now - self._looked > 0.1:
            self._looked = now
            if None not in self._ranks.codes():
                self._read_output()
                return None
        if self.resumed is None:
            self._read_output()
        at = int(self._last.get("step", 0))
        if self.recovered_s is None and self.resumed is not None and at > self.resumed:
            self.recovered_s = now - self._ranks.began
        return at

    def _read_output(self) -> None:
        output = self._ranks.output()
        if not _BEGINS.search(output):
            return
        # Rank 0 says where it continues right after what it trains; by now it has said so.
        time.sleep(0.05)
        found = _CONTINUES.search(self._ranks.output())
        self.resumed = int(found[1].replace(",", "")) if found else 0

    def _is(self, phase: str) -> bool:
        if phase == "saving":
            return any(self._scene.checkpoints.glob(".tmp-*"))
        if phase == "evaluation":
            step = int(self._last.get("step", 0))
            return step % STEPS_PER_EPOCH == 0 and "val/top1" not in self._last
        return phase == "training"


def phase_for(scene: Scene, phases: tuple[str, ...], rng: random.Random) -> str:
    """A random phase of those given; the end only where it is near."""
    near_end = last_step(scene.run) > 0.7 * scene.course.total_steps
    if "end" in phases and near_end and rng.random() < 0.4:
        return "end"
    return rng.choice([phase for phase in phases if phase != "end"] or ["end"])
