"""The results of `benchmarks.front`: a run is a line of a CSV file that only grows."""

from __future__ import annotations

import csv
import fcntl
import io
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from launcher.errors import UsageError


@dataclass(frozen=True)
class Line:
    """One run. `name` is the method's or its variant's, `asked` the density asked for.

    `layers` has the live connections of each layer, in the network's order; `settings` is a digest
    of all that decides the run but its split and the code.
    """

    name: str
    asked: float
    split: int
    top1: float
    loss: float
    density: float
    seconds: float
    settings: str
    layers: str

    @property
    def key(self) -> tuple[str, float, int, str]:
        """What a run is: of two lines with one key the later one counts."""
        return self.name, self.asked, self.split, self.settings


_COLUMNS = [field.name for field in fields(Line)]


def read(path: Path) -> list[Line]:
    """The lines of a file, none if there is none; what a kill cut short is no line.

    Raises UsageError where the file is another one.
    """
    if not path.exists():
        return []
    text = path.read_text()
    if not text:
        return []
    rows = list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))
    if rows and rows[0] != _COLUMNS:
        raise UsageError(
            f"{path} has other columns than {','.join(_COLUMNS)}: move it away, or give another "
            "folder with --folder"
        )
    return [_line(row) for row in rows[1:] if len(row) == len(_COLUMNS)]


def _line(row: list[str]) -> Line:
    name, asked, split, top1, loss, density, seconds, settings, layers = row
    return Line(
        *(name, float(asked), int(split), float(top1), float(loss), float(density)),
        *(float(seconds), settings, layers),
    )


def append(path: Path, line: Line) -> None:
    """Add a line, durably and in one write, beside whatever other processes add. Raises OSError."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        size = os.fstat(handle).st_size
        parts = [] if size else [_written(_COLUMNS)]
        # A kill may have cut the last line short: it ends where it is, and is no line.
        if size and os.pread(handle, 1, size - 1) != b"\n":
            parts.append("\n")
        values = [f"{v:.6g}" if isinstance(v, float) else v for v in astuple(line)]
        os.write(handle, "".join([*parts, _written(values)]).encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def _written(values: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()
