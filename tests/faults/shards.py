"""Faults of the data: a shard that is no longer there."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

from tests.faults.course import STEPS_PER_EPOCH
from tests.faults.faults import RunningFault, Scene, StoppedFault
from tests.faults.published import last_step
from tests.faults.ranks import Ranks, clean, wait_for


class ShardVanishes(RunningFault):
    kind = "a shard vanishes, running"
    what = "a random shard is moved away while ranks read; it is back before the next start"
    phases = ("start-up", "training", "evaluation")
    cause = r"shard-\d+\.tar"

    @contextlib.contextmanager
    def around(self, scene: Scene) -> Iterator[None]:
        """At the end every shard is back."""
        self._went_on = False
        try:
            yield
        finally:
            bring_back(scene.course.data)

    def strike(self, scene: Scene, ranks: Ranks) -> str:
        return str(take_away(scene, ("train", "val")))

    def wait_end(self, scene: Scene, ranks: Ranks) -> float | None:
        """The run ends; or, where it has the shard open or in memory, goes on unharmed."""
        until = last_step(scene.run) + 3 * STEPS_PER_EPOCH
        gone = lambda: not ranks.alive()  # noqa: E731
        wait_for(lambda: gone() or last_step(scene.run) >= until, scene.course.limits.start, 0.05)
        if ranks.wait_gone(0.5) is not None:
            self._went_on = set(ranks.codes()) == {0}
        else:
            self._went_on = "error" not in ranks.output()
            ranks.ask_to_stop(signal.SIGTERM)
        return ranks.wait_gone(scene.course.limits.end)

    def cause_problems(self, ranks: Ranks) -> list[str]:
        return [] if self._went_on else super().cause_problems(ranks)


class ShardMissing(StoppedFault):
    kind = "a shard is missing at start"
    what = "a random shard is moved away before a start; it is back before the next"

    def strike(self, scene: Scene) -> tuple[str, str | None]:
        shard = take_away(scene, ("train", "val"))
        log = scene.run / "without-a-shard.txt"
        log.unlink(missing_ok=True)
        launcher = scene.rng.choice(("scl train", "by hand"))
        try:
            with Ranks(scene.course.arguments(scene.run), log, launcher) as ranks:
                self.ended_s = ranks.wait_gone(scene.course.limits.end + 60)
                self._codes, self._output = ranks.codes(), ranks.output()
        finally:
            bring_back(scene.course.data)
        return f"{shard}, {launcher}", None

    def warning_problems(self, output: str, damaged: str | None) -> tuple[str, list[str]]:
        """The start without the shard was refused, and the refusal names it."""
        said = next((line for line in clean(self._output) if "error:" in line), "")
        problems = []
        if self.ended_s is None:
            problems.append("the start without the shard did not end")
        if set(self._codes) != {2}:
            problems.append(f"exit codes {self._codes} instead of 2")
        if "shard-" not in said:
            problems.append(f"the refusal does not name the shard: {said or 'nothing was said'}")
        return said, problems


def take_away(scene: Scene, splits: tuple[str, ...]) -> Path:
    """Move a random shard out of its folder; its former path, relative to the data."""
    shards = sorted(p for split in splits for p in (scene.course.data / split).glob("*.tar"))
    shard = scene.rng.choice(shards)
    away = scene.course.data / "away"
    away.mkdir(exist_ok=True)
    shard.rename(away / f"{shard.parent.name}+{shard.name}")
    return shard.relative_to(scene.course.data)


def bring_back(data: Path) -> None:
    """Put every shard back where it was."""
    for shard in (data / "away").glob("*.tar"):
        split, name = shard.name.split("+")
        shard.rename(data / split / name)
