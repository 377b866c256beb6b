"""What a run has published, read from its folder alone, and what must never be lost of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FOLDER = re.compile(r"^step-(\d{8,})(?:\.\d+)?$")
# Times, and what follows from them and from the machine; everything else must be equal.
_OF_THE_CLOCK = ("time", "speed/")
_NOT_COMPARED = ("train_seconds", "artifacts")


@dataclass(frozen=True)
class Saved:
    """A published checkpoint: its step, when it was written (ns), SHA-256 of each file."""

    step: int
    written: int
    files: dict[str, str]


@dataclass(frozen=True)
class Published:
    """Everything a run has published at one moment."""

    lines: list[bytes]
    discarded: list[bytes]
    checkpoints: dict[str, Saved]
    latest: str | None
    results: dict[str, str]

    @classmethod
    def read(cls, run: Path) -> Published:
        """Read a run folder in which nothing is being written."""
        root = run / "checkpoints"
        saved = {p.name: _saved(p) for p in root.glob("step-*")} if root.is_dir() else {}
        pointer = root / "latest"
        return cls(
            lines=_lines(run / "metrics.jsonl"),
            discarded=_lines(run / "metrics.discarded.jsonl"),
            checkpoints={name: one for name, one in saved.items() if one is not None},
            latest=pointer.read_text(errors="replace").strip() if pointer.is_file() else None,
            results={name: _sha256(run / name) for name in RESULTS if (run / name).is_file()},
        )

    def newest(self, damaged: Iterable[str] = ()) -> str | None:
        """The checkpoint a start should use: the one `latest` names, else the last written."""
        sound = {name: one for name, one in self.checkpoints.items() if name not in set(damaged)}
        if self.latest in sound:
            return self.latest
        return max(sound, key=lambda name: sound[name].written, default=None)


RESULTS = ("model.safetensors", "layers.csv", "summary.json", "summary.png")


def last_step(run: Path) -> int:
    """The step of the last whole line of metrics.jsonl; 0 if there is none."""
    record = last_record(run)
    return int(record.get("step", 0))


def last_record(run: Path) -> dict[str, Any]:
    """The last whole line of metrics.jsonl; empty if there is none. Cheap: reads the end only."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 8192))
            whole = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return {}
    for line in reversed(whole):
        if (record := _parsed(line)) is not None:
            return record
    return {}


def series(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """The lines as records, without what the clock decides."""
    records = [record for line in lines if (record := _parsed(line)) is not None]
    return [
        {key: value for key, value in record.items() if not key.startswith(_OF_THE_CLOCK)}
        for record in records
    ]


def difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str | None:
    """The first difference between two series of the same steps, in words; None if equal."""
    for one, other in zip(ours, theirs, strict=False):
        if one["step"] != other["step"]:
            return f"a line of step {one['step']} where the undisturbed run has {other['step']}"
        for key in sorted(one.keys() | other.keys()):
            if one.get(key) != other.get(key):
                return (
                    f"step {one['step']}: {key} is {one.get(key)}, "
                    f"{other.get(key)} in the undisturbed run"
                )
    if len(ours) != len(theirs):
        return f"{len(ours)} lines, {len(theirs)} in the undisturbed run"
    return None


def lost(before: Published, after: Published, resumed: int, damaged: Iterable[str]) -> list[str]:
    """What was published before a start that continued at step `resumed`, and is not there now."""
    problems = []
    kept = [line for line in before.lines if _step(line) is not None and _step(line) <= resumed]  # type: ignore[operator]
    if after.lines[: len(kept)] != kept:
        problems.append(f"metrics.jsonl lost lines up to step {resumed}")
    if resumed:
        aside = set(after.discarded) | set(after.lines)
        missing = [line for line in before.lines if _step(line) is not None and line not in aside]
        if missing:
            problems.append(f"{len(missing)} lines of metrics are in neither of the two files")
    newest = before.newest(damaged)
    if newest is not None:
        now = after.checkpoints.get(newest)
        if now is None:
            later = [c for c in after.checkpoints.values() if c.written > _written(before, newest)]
            if not later:
                problems.append(f"checkpoint {newest} is gone and no newer one is there")
        elif now.files != before.checkpoints[newest].files:
            problems.append(f"checkpoint {newest} was changed after it was published")
    return problems


def unequal(run: Path, reference: Path) -> list[str]:
    """In what a finished run's network and state differ from the undisturbed one's, bit for bit."""
    # Seconds to import, and of no use where a campaign is only started.
    from tests.faults.state_hash import state_hash

    problems = [f"{name} is missing" for name in RESULTS if not (run / name).is_file()]
    if problems:
        return problems
    for name in ("model.safetensors", "layers.csv"):
        if (run / name).read_bytes() != (reference / name).read_bytes():
            problems.append(f"{name} differs")
    one, other = (_summary(folder) for folder in (run, reference))
    problems += [f"summary.json differs in {key}" for key in one if one[key] != other.get(key)]
    states = []
    for folder in (run, reference):
        newest = Published.read(folder).newest()
        states.append(newest and state_hash(folder / "checkpoints" / newest))
    if states[0] is None or states[0] != states[1]:
        problems.append("the state in the last checkpoint differs")
    return problems


def _summary(run: Path) -> dict[str, Any]:
    summary = json.loads((run / "summary.json").read_text())
    return {key: value for key, value in summary.items() if key not in _NOT_COMPARED}


def _saved(folder: Path) -> Saved | None:
    match = _FOLDER.match(folder.name)
    if match is None:
        return None
    try:
        files = {
            str(path.relative_to(folder)): _sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        written = max((p.stat().st_mtime_ns for p in folder.rglob("*")), default=0)
    except FileNotFoundError:
        # Retired while it was being read.
        return None
    return Saved(int(match[1]), written, files)


def _written(published: Published, name: str) -> int:
    return published.checkpoints[name].written


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "step" in record else None


def _step(line: bytes) -> int | None:
    record = _parsed(line)
    return None if record is None else int(record["step"])


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
