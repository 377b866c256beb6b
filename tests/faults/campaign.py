"""A campaign: real runs, each continued through many faults, until every kind had its share."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.course import Course, Limits, nan_updates
from tests.faults.faults import Scene
from tests.faults.leg import Broken, Leg, Pending
from tests.faults.published import Published, last_step, series, unequal
from tests.faults.ranks import WORLD, Launcher
from tests.faults.record import Journal, Record
from tests.faults.registry import KINDS, NAN, RUNNING, STOPPED
from tests.faults.shards import bring_back
from tests.faults.storage import FullDisk

_FEW, _SHORT = 5, 30
_NANS_A_RUN = 12
_STARTED_BY_SCL = 0.3


class Campaign:
    """`faults` of the kinds in `wanted`, drawn by `seed`, with everything it writes in `work`.

    A campaign that was killed goes on when it is started again with the same folder.
    """

    def __init__(self, work: Path, faults: int, seed: int, only: list[str], limits: Limits) -> None:
        self.work, self.seed, self._limits = work, seed, limits
        self._short = faults < _SHORT
        work.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(work / "record.jsonl")
        self.skipped: dict[str, str] = {}
        if reason := FullDisk.impossible():
            self.skipped[FullDisk.kind] = reason
        kinds = [k for k in KINDS if k not in self.skipped and (not only or k in only)]
        share, more = divmod(faults, len(kinds))
        self.wanted = {kind: share + (i < more) for i, kind in enumerate(kinds)}

    def run(self, tell: Callable[[Record], None]) -> None:
        """Inject what is missing; `tell` hears of every fault once it is injected."""
        number = len({r.run for r in self.journal.records.values()})
        if any(r.equal is None for r in self.journal.records.values()):
            number -= 1
        while missing := self._missing():
            courses = list(self._courses(missing))
            course = courses[number % len(courses)]
            course.prepare()
            self._one_run(course, self.work / f"run-{number:02d}", tell)
            number += 1

    def _missing(self) -> Counter[str]:
        return Counter(
            {
                kind: count - self.journal.count(kind)
                for kind, count in self.wanted.items()
                if count > self.journal.count(kind)
            }
        )

    def _courses(self, missing: Counter[str]) -> Iterator[Course]:
        # A run must last for what is to strike it.
        epochs = 8 if sum(self.wanted.values()) < _FEW else 16 if self._short else 30
        nans = self.wanted.get(NAN, 0)
        if nans and (missing[NAN] or self._short):
            steps = Course("", self.work, self._limits, epochs).total_steps
            chosen = nan_updates(random.Random(f"{self.seed} nan"), min(nans, _NANS_A_RUN), steps)
            yield Course("nan", self.work, self._limits, epochs, nans=chosen)
        if not (nans and self._short):
            yield Course("plain", self.work, self._limits, epochs)
            settings = ("engine.zero_stage=1",)
            yield Course("zero-1", self.work, self._limits, epochs, settings)

    def _one_run(self, course: Course, folder: Path, tell: Callable[[Record], None]) -> None:
        """One run folder, from its first start to the end of its training."""
        bring_back(course.data)
        scene = Scene(course, folder, random.Random(), set())
        before = self.journal.of_run(folder.name)
        scene.damaged |= {r.damaged for r in before if r.damaged is not None}
        folder.mkdir(exist_ok=True)
        pending, logs = Pending(), self.work / "logs" / folder.name
        both = (folder, course.reference)
        try:
            while not self._leg(scene, pending, logs, tell):
                pass
            problems = unequal(folder, course.reference)
            steps = [[r["step"] for r in series(Published.read(f).lines)] for f in both]
            complete = steps[0] == steps[1]
        except (Broken, TimeoutError) as error:
            problems, complete = [f"the run did not go on: {error}"], True
        if course.nans:
            self._judge_nans(course, folder, logs, tell)
        for record in self.journal.of_run(folder.name):
            record.equal = not problems
            record.problems += problems
            if not complete:
                record.problems.append("the steps in metrics.jsonl are not those undisturbed")
            self.journal.write(record)

    def _leg(
        self, scene: Scene, pending: Pending, logs: Path, tell: Callable[[Record], None]
    ) -> bool:
        """One start and its faults; whether the run is finished."""
        rng = scene.rng = random.Random(f"{self.seed} {len(self.journal.records)}")
        leg = Leg(scene, self.journal, pending, logs)
        missing = self._missing()
        stopped = [kind for kind in STOPPED if missing[kind]]
        running = [kind for kind in RUNNING if missing[kind]]
        if last_step(scene.run) and stopped and rng.random() < len(stopped) / (len(running) + 1):
            fault = STOPPED[_draw(stopped, missing, rng)]()
            if fault.possible(scene):
                tell(leg.damage(fault))
        kind = _draw(running, missing, rng) if running else None
        if kind is None and any(self._missing()[kind] for kind in STOPPED):
            # Damage needs a run that is not yet finished: it goes on in small pieces.
            kind = next(iter(RUNNING))
        launcher: Launcher = "scl train" if rng.random() < _STARTED_BY_SCL else "by hand"
        record = leg.run(kind, launcher, rng)
        if record is not None:
            tell(record)
        return record is None

    def _judge_nans(
        self, course: Course, folder: Path, logs: Path, tell: Callable[[Record], None]
    ) -> None:
        """Each NaN is a fault: both ranks skipped the update, and counted it."""
        said = [
            line
            for log in sorted(logs.glob("leg-*"))
            for line in log.read_text(errors="replace").splitlines()
            if ": NaN at update" in line
        ]
        counts = [r["train/skipped_steps"] for r in _training(Published.read(folder))]
        for update, poisoned in course.nans.items():
            of_this = [line for line in said if f"NaN at update {update} on rank" in line]
            record = self.journal.new(
                kind=NAN,
                run=folder.name,
                course=course.name,
                launcher="",
                phase="training",
                step=update,
                detail=f"rank {poisoned}",
                said=next(iter(of_this), ""),
            )
            for rank in range(WORLD):
                lines = [line for line in of_this if f"rank {rank}: NaN" in line]
                if not lines or not all(line.endswith("changed nothing") for line in lines):
                    record.problems.append(f"rank {rank} did not skip the update: {lines}")
            if not counts or counts[-1] != len(course.nans):
                record.problems.append(
                    f"{counts[-1:]} skipped updates were counted instead of {len(course.nans)}"
                )
            self.journal.write(record)
            tell(record)


def _training(published: Published) -> list[dict[str, float]]:
    return [record for record in series(published.lines) if "train/skipped_steps" in record]


def _draw(kinds: list[str], missing: Counter[str], rng: random.Random) -> str:
    return rng.choices(kinds, [missing[kind] for kind in kinds])[0]
