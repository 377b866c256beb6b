"""What a checkpoint folder consists of: its name, its manifest, and what can be wrong with it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from data.files import sha256_of
from launcher.errors import UsageError, UserError

FORMAT_VERSION = 2

_FOLDER = re.compile(r"^step-(?P<step>\d{8,})(?:\.(?P<revision>\d+))?$")
_READERS = min(8, os.cpu_count() or 1)


class CheckpointError(UserError):
    """What went wrong with a checkpoint, in words meant for the user."""


class Written(BaseModel):
    """A file as it was written."""

    bytes: int
    sha256: str


class Evaluation(BaseModel):
    """What the model of a checkpoint achieves, where it was evaluated.

    `top1` is a share of 1; `live` of its `connections` live; `final`: no mask will change any more.
    """

    top1: float
    live: int
    connections: int
    final: bool


class Manifest(BaseModel):
    """`serial` grows with every save, so that it orders checkpoints by age even after a rewind."""

    format_version: int = FORMAT_VERSION
    serial: int = 0
    step: int
    meta: dict[str, Any]
    evaluation: Evaluation | None = None
    files: dict[str, Written]


def encode(manifest: Manifest) -> str:
    """The text of manifest.json. Raises TypeError or ValueError if meta is not plain JSON."""
    body = manifest.model_dump()
    return json.dumps({**body, "checksum": _checksum(body)}, indent=1)


def read_manifest(folder: Path) -> Manifest:
    """Raises OSError or ValueError (of which pydantic's ValidationError is one)."""
    body = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if not isinstance(body, dict):
        raise ValueError("not a JSON object")
    version = body.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(f"format {version} is newer than this program's {FORMAT_VERSION}")
    if isinstance(version, int) and version < FORMAT_VERSION:
        raise ValueError(
            f"format {version} is older than this program's {FORMAT_VERSION}: finish that run "
            "with the version of scl that its environment.jsonl names"
        )
    if body.pop("checksum", None) != _checksum(body):
        raise ValueError("its checksum does not match")
    return Manifest.model_validate(body)


def _checksum(body: dict[str, Any]) -> str:
    # Through JSON and back first: what is checked later has been through it too (1 → "1" as keys).
    plain = json.loads(json.dumps(body))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def folders(root: Path) -> list[Path]:
    """Everything in `root` named like a checkpoint, by step and revision."""
    if not root.is_dir():
        return []
    matches = [match for entry in root.iterdir() if (match := _FOLDER.match(entry.name))]
    matches.sort(key=lambda match: (int(match["step"]), int(match["revision"] or 0)))
    return [root / match.string for match in matches]


def folder_names(names: Iterable[str]) -> list[str]:
    """Those of `names` that a checkpoint's folder may have, in order."""
    return sorted(name for name in names if _FOLDER.match(name))


def manifests(root: Path) -> dict[str, Manifest]:
    """The manifests that can be read, by folder name, oldest save first."""
    by_name = {}
    for folder in folders(root):
        try:
            by_name[folder.name] = read_manifest(folder)
        except (OSError, ValueError):
            continue
    return dict(sorted(by_name.items(), key=lambda item: item[1].serial))


def free_name(root: Path, step: int) -> str:
    """A free folder name for `step`: an earlier save of it stays until this one is there."""
    name, revision = f"step-{step:08d}", 0
    while (root / name).exists():
        revision += 1
        name = f"step-{step:08d}.{revision}"
    return name


def read_pointer(root: Path, pointer: str) -> tuple[str | None, str | None]:
    """The folder name that the file `pointer` holds, or what is wrong with the file."""
    try:
        name = (root / pointer).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None, f"'{pointer}' is missing"
    except (OSError, ValueError) as error:
        return None, f"'{pointer}' is unreadable ({error})"
    if not _FOLDER.match(name):
        return None, f"'{pointer}' does not name a checkpoint"
    return name, None


def problems(
    folder: Path, *, read_content: bool, on_bytes: Callable[[int], object] | None = None
) -> list[str]:
    """Everything wrong with a checkpoint folder; empty if it is sound.

    Without `read_content` only sizes are compared. `on_bytes` hears how much was checked.
    """
    if not folder.is_dir():
        return ["no such folder"]
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        return ["manifest.json is missing"]
    except (OSError, ValueError) as error:
        reason = "not as expected" if isinstance(error, ValidationError) else str(error)
        return [f"manifest.json is unreadable: {reason}"]
    return file_problems(folder, manifest.files, read_content=read_content, on_bytes=on_bytes)


def file_problems(
    folder: Path,
    files: dict[str, Written],
    *,
    read_content: bool,
    on_bytes: Callable[[int], object] | None = None,
) -> list[str]:
    """Everything in which the files of `folder` differ from what was written."""

    def check(name: str) -> str | None:
        problem = _file_problem(folder / name, files[name], read_content)
        if on_bytes is not None:
            on_bytes(files[name].bytes)
        return problem

    # Several at once: hashing takes as long as reading, and a sharded checkpoint has many files.
    with ThreadPoolExecutor(_READERS) as readers:
        results: Iterable[str | None] = readers.map(check, files)
        return [problem for problem in results if problem]


def _file_problem(path: Path, expected: Written, read_content: bool) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected.bytes:
            return f"{path.name} has {size} bytes instead of {expected.bytes}"
        if read_content and sha256_of(path) != expected.sha256:
            return f"{path.name} does not match its SHA-256"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} is unreadable: {error}"
    return None


def root_of(run: Path) -> Path:
    """Where the checkpoints of `run` are: in its subfolder, or in `run` itself.

    Raises UsageError where there are none.
    """
    for root in (run / "checkpoints", run):
        if folders(root):
            return root
    raise UsageError(
        f"{run} holds no checkpoints: give the folder of a run, such as runs/digits_scl"
    )


def size_of(folder: Path) -> int:
    """Bytes of a checkpoint, as its manifest says; without a readable one, as they lie there."""
    try:
        return sum(file.bytes for file in read_manifest(folder).files.values())
    except (OSError, ValueError):
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
