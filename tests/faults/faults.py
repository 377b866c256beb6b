"""What a fault is; each kind is one small class, listed in `registry.py`."""

from __future__ import annotations

import contextlib
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from tests.faults.course import Course
from tests.faults.published import Published
from tests.faults.ranks import Launcher, Ranks, clean

PHASES = ("start-up", "training", "saving", "evaluation", "end")
# The first line that speaks of trouble must name the cause.
_TROUBLE = re.compile(
    r"\berror: |stopped by|ends because|Traceback|cannot save|not be saved|no space|has been at",
    re.IGNORECASE,
)


@dataclass
class Scene:
    """Where a fault happens: one run folder, in which one start after the other is disturbed."""

    course: Course
    run: Path
    rng: random.Random
    damaged: set[str] = field(default_factory=set)
    """Checkpoints damaged so far; they stay where they are."""

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    @property
    def finished(self) -> bool:
        return (self.run / "summary.json").exists()

    def published(self) -> Published:
        return Published.read(self.run)

    def sound(self) -> list[str]:
        """The checkpoints nobody damaged."""
        return [name for name in self.published().checkpoints if name not in self.damaged]


class RunningFault:
    """Something that happens to ranks at work."""

    kind: ClassVar[str]
    what: ClassVar[str]
    """What is done, for the table."""
    phases: ClassVar[tuple[str, ...]] = PHASES
    launcher: ClassVar[Launcher | None] = None
    """The only launcher for which it makes sense; None: any."""
    cause: ClassVar[str | None] = None
    """What the first line that speaks of trouble must contain (a pattern); None: nobody is left."""

    def around(self, scene: Scene) -> contextlib.AbstractContextManager[object]:
        """What must hold while the ranks run."""
        return contextlib.nullcontext()

    def strike(self, scene: Scene, ranks: Ranks) -> str:
        """Do it; returns what exactly was done."""
        raise NotImplementedError

    def wait_end(self, scene: Scene, ranks: Ranks) -> float | None:
        """Seconds until every process is gone; None if one outlives the limit.

        The time-out runs from when a rank begins to wait: one that is still starting gets there.
        """
        starting = "= batch" not in ranks.output()
        return ranks.wait_gone(scene.course.limits.end * (1 + starting))

    def problems(self, scene: Scene, ranks: Ranks, phase: str) -> list[str]:
        """What is not as required, after the end, beside what is checked for every kind."""
        return []

    def said(self, ranks: Ranks) -> str:
        """The first line of the output that speaks of trouble."""
        return next((line for line in clean(ranks.output()) if _TROUBLE.search(line)), "")

    def cause_problems(self, ranks: Ranks) -> list[str]:
        """Whether the first cause was shown."""
        said = self.said(ranks)
        if self.cause is None or re.search(self.cause, said):
            return []
        return [f"the first line of trouble does not name the cause: {said or 'there is none'}"]


class StoppedFault:
    """Something that happens to the folder of a run while no process of it runs."""

    kind: ClassVar[str]
    what: ClassVar[str]

    def possible(self, scene: Scene) -> bool:
        """Whether there is something to damage, and something left to go on from."""
        return True

    def strike(self, scene: Scene) -> tuple[str, str | None]:
        """Do it; returns what exactly was done, and the checkpoint that is damaged now, if any."""
        raise NotImplementedError

    def warning_problems(self, output: str, damaged: str | None) -> tuple[str, list[str]]:
        """The line of the next start that names the damage, and what is wrong with it."""
        lines = clean(output)
        said = next((line for line in lines if damaged and damaged in line), "")
        if not re.search(r"damaged|unreadable|does not name", said):
            return said, [f"no warning names {damaged}"]
        if "using" not in said:
            return said, [f"the warning does not say what is used instead: {said}"]
        return said, []
