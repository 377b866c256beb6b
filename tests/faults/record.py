"""The record of a campaign: JSON lines, added to as things become known, never rewritten."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Record:
    """One fault and what came of it; None is: not known (yet)."""

    number: int
    kind: str
    run: str
    course: str
    launcher: str
    phase: str
    step: int
    detail: str = ""
    said: str = ""
    """The line with which the run named the cause."""
    damaged: str | None = None
    """The checkpoint that was damaged."""
    ended_s: float | None = None
    recovered_s: float | None = None
    equal: bool | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def as_required(self) -> bool:
        return not self.problems

    def line(self) -> str:
        """One line for the terminal."""
        ended = "" if self.ended_s is None else f" ended in {self.ended_s:.1f} s"
        verdict = "; ".join(self.problems) or self.said or "as required"
        return (
            f"#{self.number:<3} {self.kind:<22} {self.launcher:<9} {self.phase:<10} "
            f"step {self.step:>4}{ended}: {verdict[:160]}"
        )


class Journal:
    """Every record of a campaign, on disk from the moment it is known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.records: dict[int, Record] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                values = json.loads(line)
            except ValueError:
                # Cut short when the campaign was killed; the fault counts as not injected.
                continue
            self.records[values["number"]] = Record(**values)

    def new(self, **values: Any) -> Record:
        """A record with the next number, not yet on disk."""
        return Record(number=len(self.records) + 1, **values)

    def write(self, record: Record) -> None:
        """Add the record, or what has become known of it."""
        self.records[record.number] = record
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
            file.flush()

    def of_run(self, run: str) -> list[Record]:
        """The records of one run folder, in order."""
        return [r for r in self.records.values() if r.run == run]

    def count(self, kind: str) -> int:
        """How many faults of a kind have been injected."""
        return sum(r.kind == kind for r in self.records.values())
