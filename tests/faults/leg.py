"""One leg of a run: perhaps damage to its folder, a start, a fault in the midst, the end."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.faults import RunningFault, Scene, StoppedFault
from tests.faults.published import Published, difference, last_step, lost, series
from tests.faults.ranks import Launcher, Ranks, clean
from tests.faults.record import Journal, Record
from tests.faults.registry import RUNNING
from tests.faults.watch import Watch, phase_for


@dataclass
class Pending:
    """Faults of which it is not yet known whether the run went on from where it should."""

    records: list[Record] = field(default_factory=list)
    damages: list[tuple[StoppedFault, Record]] = field(default_factory=list)
    output: str = ""
    """What the starts since then have said: one may warn of damage and be struck at once."""

    def clear(self) -> None:
        self.records.clear()
        self.damages.clear()
        self.output = ""


class Broken(Exception):
    """A start that should have gone on ended by itself: the run folder is given up."""


class Leg:
    """Everything between two moments at which no process of the run lives."""

    def __init__(self, scene: Scene, journal: Journal, pending: Pending, logs: Path) -> None:
        self._scene, self._journal, self._pending = scene, journal, pending
        logs.mkdir(parents=True, exist_ok=True)
        self._log = logs / f"leg-{len(list(logs.glob('leg-*'))):03d}.txt"

    def damage(self, fault: StoppedFault) -> Record:
        """Inject a fault while nothing runs."""
        record = self._journal.new(
            kind=fault.kind,
            run=self._scene.run.name,
            course=self._scene.course.name,
            launcher="",
            phase="stopped",
            step=last_step(self._scene.run),
        )
        record.detail, record.damaged = fault.strike(self._scene)
        if record.damaged is not None:
            self._scene.damaged.add(record.damaged)
            self._pending.damages.append((fault, record))
        else:
            record.ended_s = getattr(fault, "ended_s", None)
            record.said, record.problems = fault.warning_problems("", None)
        self._pending.records.append(record)
        self._journal.write(record)
        return record

    def run(self, kind: str | None, launcher: Launcher, rng: random.Random) -> Record | None:
        """Start, strike with a fault of `kind` (None: leave it in peace), wait for the end.

        Returns the fault's record; None if the run ended before it could be injected. Raises
        Broken if it ended, and not as a finished run does.
        """
        scene = self._scene
        fault = RUNNING[kind]() if kind else _Peace()
        launcher = fault.launcher or launcher
        phase = phase_for(scene, fault.phases, rng)
        before = scene.published()
        arguments = scene.course.arguments(scene.run)
        environment = scene.course.environment
        record = None
        with fault.around(scene), Ranks(arguments, self._log, launcher, **environment) as ranks:
            watch = Watch(scene, ranks)
            reached = watch.reach(phase, fault.phases, rng)
            # Since it was looked at last, the run may have come to its end.
            if reached is not None and kind is not None and None in ranks.codes():
                record = self._strike(fault, ranks, reached)
            else:
                ranks.wait_gone(scene.course.limits.end)
            codes = ranks.codes()
        self._check_start(watch, before, ranks.output())
        if record is None:
            if not scene.finished or set(codes) != {0}:
                last = clean(ranks.output())[-12:]
                raise Broken(f"exit codes {codes}: " + " | ".join(last))
            return None
        self._pending.records.append(record)
        self._journal.write(record)
        return record

    def _strike(self, fault: RunningFault, ranks: Ranks, phase: str) -> Record:
        scene = self._scene
        record = self._journal.new(
            kind=fault.kind,
            run=scene.run.name,
            course=scene.course.name,
            launcher=ranks.launcher,
            phase=phase,
            step=last_step(scene.run),
        )
        began = time.monotonic()
        record.detail = fault.strike(scene, ranks)
        record.ended_s = fault.wait_end(scene, ranks)
        if record.ended_s is None:
            left = ranks.sweep()
            record.problems.append(
                f"alive {time.monotonic() - began:.0f} s after the fault: {'; '.join(left)}"
            )
        record.said = fault.said(ranks)
        record.problems += fault.problems(scene, ranks, phase)
        record.problems += fault.cause_problems(ranks)
        return record

    def _check_start(self, watch: Watch, before: Published, output: str) -> None:
        """Whether the start went on from the newest sound state, with nothing lost or doubled."""
        self._pending.output += output
        if watch.resumed is None:
            return
        scene, problems = self._scene, []
        after = scene.published()
        newest = before.newest(scene.damaged)
        expected = before.checkpoints[newest].step if newest else 0
        if watch.resumed != expected:
            problems.append(f"continued at step {watch.resumed}, {newest} is the newest sound one")
        problems += lost(before, after, watch.resumed, scene.damaged)
        undisturbed = series(Published.read(scene.course.reference).lines)
        ours = series(after.lines)
        # What was there before has been compared before.
        new = sum(record["step"] <= watch.resumed for record in ours)
        if found := difference(ours[new:], undisturbed[new : len(ours)]):
            problems.append(f"metrics.jsonl: {found}")
        for fault, record in self._pending.damages:
            record.said, wrong = fault.warning_problems(self._pending.output, record.damaged)
            record.problems += wrong
        for record in self._pending.records:
            record.recovered_s = watch.recovered_s
            record.problems += problems
            self._journal.write(record)
        self._pending.clear()


class _Peace(RunningFault):
    """No fault: the run goes to its end."""

    kind = what = "none"
    phases = ("end",)
