"""Reads what W&B wrote offline, with the records that W&B's own library defines."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import wandb


def records_of(run_dir: Path, run_id: str) -> list[list[Any]]:
    """The records of each offline run of this id, oldest first."""
    # finish() may return before the file is flushed; the end of the service, as at exit, is after.
    wandb.teardown()
    folders = sorted((run_dir / "wandb").glob(f"offline-run-*-{run_id}"))
    return [_read(folder / f"run-{run_id}.wandb") for folder in folders]


def _read(path: Path) -> list[Any]:
    """Parse a .wandb file: LevelDB's log format behind 7 bytes of its own."""
    from wandb.proto import wandb_internal_pb2 as pb

    data, position, pending, records = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        pending += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = pb.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(pending)
            records.append(record)
            pending = b""
    return records


def items_of(items: Any) -> dict[str, Any]:
    return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}


def history_of(records: list[Any]) -> list[dict[str, Any]]:
    return [items_of(r.history.item) for r in records if r.WhichOneof("record_type") == "history"]


def of_type(records: list[Any], kind: str) -> list[Any]:
    return [getattr(r, kind) for r in records if r.WhichOneof("record_type") == kind]
