"""The table of a campaign, and its place in a document."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.faults.ranks import ROOT
from tests.faults.record import Record
from tests.faults.registry import KINDS, WHAT

BEGIN, END = "<!-- campaign: begin -->", "<!-- campaign: end -->"
_PACKAGES = ("torch", "deepspeed", "numpy")


def table(records: Iterable[Record], skipped: dict[str, str]) -> str:
    """By kind: faults, ended as required, slowest end and recovery (s), equal final weights."""
    records = list(records)
    rows = [
        "| fault | what is done | injected | as required | slowest end, s | slowest recovery, s "
        "| final weights equal |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind in KINDS:
        if kind in skipped:
            rows.append(f"| {kind} | {WHAT[kind]} | skipped: {skipped[kind]} | | | | |")
        elif ours := [r for r in records if r.kind == kind]:
            rows.append(f"| {kind} | {WHAT[kind]} | {_figures(ours)} |")
    rows.append(f"| **all** | | {_figures(records)} |")
    return "\n".join(rows)


def phases(records: Iterable[Record]) -> str:
    """One sentence: how many faults fell into which phase."""
    counts: dict[str, int] = {}
    for record in records:
        counts[record.phase] = counts.get(record.phase, 0) + 1
    return ", ".join(f"{phase} {count}" for phase, count in sorted(counts.items()))


def report(records: list[Record], skipped: dict[str, str], command: str, minutes: float) -> str:
    """The table with what a reader needs to believe it."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    by_scl = sum(record.launcher == "scl train" for record in records)
    runs = len({record.run for record in records})
    failed = [record for record in records if record.problems]
    lines = [
        f"`{command}`, {datetime.date.today()}, commit {_commit()}; {platform.machine()}, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, {versions}; 2 ranks, "
        f"{minutes:.0f} minutes.",
        "",
        f"{len(records)} faults in {runs} runs; {by_scl} of the starts that were struck were made "
        f"by `scl train`, the others by hand. By phase: {phases(records)}.",
        "",
        table(records, skipped),
    ]
    if failed:
        lines += ["", "Not as required:", ""]
        lines += [f"- {r.kind}, {r.phase}, step {r.step}: {'; '.join(r.problems)}" for r in failed]
    return "\n".join(lines)


def write_between_markers(path: Path, text: str) -> None:
    """Replace what is between the markers of the document. Raises ValueError without them."""
    document = path.read_text()
    if BEGIN not in document or END not in document:
        raise ValueError(f"{path} has no lines {BEGIN} and {END} to write between")
    head, tail = document.split(BEGIN)[0], document.split(END)[1]
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")
    temporary.replace(path)


def _figures(records: list[Record]) -> str:
    as_required = sum(r.as_required for r in records)
    judged = [r for r in records if r.equal is not None]
    equal = sum(bool(r.equal) for r in judged)
    return (
        f"{len(records)} | {as_required} | {_slowest(r.ended_s for r in records)} | "
        f"{_slowest(r.recovered_s for r in records)} | {equal} of {len(judged)}"
    )


def _slowest(seconds: Iterable[float | None]) -> str:
    known = [value for value in seconds if value is not None]
    return f"{max(known):.1f}" if known else "–"


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
