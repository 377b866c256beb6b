"""`metrics.jsonl`: the record of a run that is always there."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from data.files import atomic_write
from launcher.tracking.values import json_of

_log = logging.getLogger("scl.tracking")


class Lines:
    """`metrics.jsonl`, appended to line by line, each handed to the system at once."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self._path = path
        self._warned = False
        self._torn = False
        path.parent.mkdir(parents=True, exist_ok=True)
        _rewind(path, resume_step)
        self._file = path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        line = json.dumps(json_of(record), ensure_ascii=False).encode() + b"\n"
        # A line that a full disk cut short ends here, so that it spoils no other.
        data = b"\n" + line if self._torn else line
        try:
            self._torn = self._file.write(data) != len(data)
        except OSError as error:
            self._torn = True
            self._warn(error)

    def flush(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        if not self._file.closed:
            self.flush()
            self._file.close()

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            _log.warning("cannot write %s, metrics are being lost: %s", self._path, error)
            self._warned = True


def _rewind(path: Path, resume_step: int) -> None:
    """Move the lines past `resume_step`, and what a kill cut short, out of the way.

    After a kill between the two writes the next start moves them again: some lines are then in the
    discarded file twice, but none is lost.
    """
    if not path.exists():
        return
    kept, discarded = [], []
    for line in filter(None, path.read_bytes().split(b"\n")):
        step = _step_of(line)
        if step is None:
            torn = json.dumps({"unreadable": line.decode(errors="replace")})
            discarded.append(torn.encode())
        else:
            (discarded if step > resume_step or resume_step == 0 else kept).append(line)
    if not discarded:
        return
    with path.with_name("metrics.discarded.jsonl").open("ab") as file:
        file.writelines(line + b"\n" for line in discarded)
        file.flush()
        os.fsync(file.fileno())
    atomic_write(path, b"".join(line + b"\n" for line in kept))


def _step_of(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
