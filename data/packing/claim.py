"""One folder, one packing: who holds it, and in what another one differs from it."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import atomic_write, remove_leftovers
from data.packing.origin import difference, note_origin
from data.shards.manifest import MANIFEST_NAME
from data.sources.source import Source

PACKING_NAME = "packing.json"


def check_kind(out: Path, kind: str) -> None:
    """Refuse, before anything costly, a folder that holds a packing of another kind.

    Raises DataError if it does.
    """
    path = out / PACKING_NAME
    if path.exists():
        _refuse_other(out, path.read_bytes(), {"kind": kind}, None)


@contextlib.contextmanager
def claimed(out: Path, description: dict[str, Any], source: Source) -> Iterator[None]:
    """Hold `out` for this packing alone; refuse a folder that holds another one."""
    path = out / PACKING_NAME
    splits = list(source.splits)
    if not path.exists():
        for split in splits:
            _refuse_foreign(out / split)
            (out / split).mkdir(parents=True, exist_ok=True)
        note_origin(out, source)
        _write(path, description)
    with contextlib.ExitStack() as held:
        stored = _locked(held, path)
        _refuse_other(out, stored, description, source)
        if json.loads(stored) != description and not _is_complete(out, source):
            # The background has been chosen later: from now on it is that and no other.
            _write(path, description)
            _locked(held, path)
        for split in splits:
            (out / split).mkdir(exist_ok=True)
            remove_leftovers(out / split)
        remove_leftovers(out)
        yield


def _write(path: Path, description: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(description, indent=1) + "\n")


def _locked(held: contextlib.ExitStack, path: Path) -> bytes:
    """The content of `path`, which no other process can hold until `held` ends."""
    stream = held.enter_context(path.open("rb"))
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(
            f"another process is packing into {path.parent}; wait for it or choose another --out"
        ) from error
    return stream.read()


def _refuse_foreign(folder: Path) -> None:
    if (folder / MANIFEST_NAME).exists() or any(folder.glob("*.tar")):
        raise DataError(
            f"{folder} holds shards that were not packed here; remove it or choose another --out"
        )


def _refuse_other(
    out: Path, stored: bytes, description: dict[str, Any], source: Source | None
) -> None:
    try:
        before = json.loads(stored)
    except ValueError:
        before = {}
    if not isinstance(before, dict):
        before = {}
    if source is not None and not _is_complete(out, source):
        description = _with_later_choices(description, before)
    differing = [key for key in description if before.get(key) != description[key]]
    if differing:
        said = [_said(key, before.get(key), description[key], out, source) for key in differing]
        raise DataError(
            f"{out} holds another packing ({'; '.join(said)}); remove it or choose another --out"
        )


def _is_complete(out: Path, source: Source) -> bool:
    return all((out / split / MANIFEST_NAME).exists() for split in source.splits)


def _with_later_choices(description: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Without the background where none was chosen: no image that is packed yet needed one."""
    options = description.get("options", {})
    if "background" in before.get("options", {}) or "background" not in options:
        return description
    rest = {key: value for key, value in options.items() if key != "background"}
    return description | {"options": rest}


def _said(key: str, before: Any, now: Any, out: Path, source: Source | None) -> str:
    """In words, in what a packing differs from the one that is there."""
    if key == "fingerprint":
        return (source is not None and difference(out, source)) or "the list of images differs"
    if key == "options" and isinstance(before, dict) and isinstance(now, dict):
        names = sorted(name for name in before | now if before.get(name) != now.get(name))
        return ", ".join(_changed(name, before.get(name), now.get(name)) for name in names)
    return _changed(key, before, now)


def _changed(name: str, before: Any, now: Any) -> str:
    there, here = ("not given" if value is None else value for value in (before, now))
    return f"{name}: {there} there, {here} now"
