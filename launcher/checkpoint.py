"""Checkpoints on disk: written whole or not at all, recognised when damaged, kept by a rule.

A checkpoint root looks like this; whoever kills the writer at any moment finds it usable:

    step-00000120/   model.pt  optimizer.pt  …  manifest.json (sizes, SHA-256, meta)
    step-00000240/
    step-00000240.1/ the same step saved again: beside the first, which goes once this one is named
    latest           the name of the newest folder
    best             the name of the best one, which retention spares

Called on global rank 0 only; gathering what the other ranks hold is the caller's job.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import BaseModel, Field, ValidationError
from torch.serialization import get_unsafe_globals_in_checkpoint

from data.files import sha256_of
from launcher.files import (
    atomic_write,
    fsync_dir,
    remove_leftovers,
    remove_tree,
    temporary_beside,
)

FORMAT_VERSION = 1

_log = logging.getLogger("scl.checkpoint")
_FOLDER = re.compile(r"^step-(?P<step>\d{8,})(?:\.(?P<revision>\d+))?$")
_PART_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")


class CheckpointConfig(BaseModel, extra="forbid"):
    """When checkpoints are written, how many stay, and what a start does with those it finds."""

    every_epochs: int = Field(default=1, ge=1, description="Save after every so many epochs.")
    keep: int = Field(
        default=2,
        ge=1,
        description="How many of the newest checkpoints stay; the best one stays besides.",
    )
    resume: str = Field(
        default="auto",
        description=(
            "'auto': continue from the newest sound checkpoint of the run folder, if there is one. "
            "'never': start anew, and refuse to if the run folder holds checkpoints. "
            "Anything else: the path of the checkpoint to continue from."
        ),
    )


class CheckpointError(Exception):
    """What went wrong with a checkpoint, in words meant for the user."""


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint: its folder, the training step it was taken at, the caller's meta."""

    path: Path
    step: int
    meta: dict[str, Any]


class _File(BaseModel):
    bytes: int
    sha256: str


class _Manifest(BaseModel):
    """`serial` grows with every save, so that it orders checkpoints by age even after a rewind."""

    format_version: int
    serial: int
    step: int
    meta: dict[str, Any]
    files: dict[str, _File]


def save(
    root: Path,
    *,
    step: int,
    parts: dict[str, Any],
    meta: dict[str, Any],
    keep: int,
    best: bool = False,
) -> Checkpoint:
    """Publish a checkpoint in `root` and retire old ones; what was there stays usable throughout.

    `parts` maps a name ("model", "rank-00000") to a tree of tensors and plain values, written to
    `<name>.pt`; `meta` is JSON. The newest `keep` checkpoints remain, and the one named by `best`.
    `best=True` makes this one the best.

    Raises CheckpointError if the disk refuses, if a part holds anything that could not be loaded
    again without running code, or if meta is not JSON; those saved before are then untouched.
    """
    manifest = _Manifest(format_version=FORMAT_VERSION, serial=0, step=step, meta=meta, files={})
    _check_writable(parts, manifest)
    try:
        root.mkdir(parents=True, exist_ok=True)
        for name in remove_leftovers(root):
            _log.info("removed %s, left by a run that died while saving", name)
        known = _manifests(root)
        manifest.serial = 1 + max((found.serial for found in known.values()), default=0)
        target = root / _free_name(root, step)
        _write_folder(target, parts, manifest)
        # `best` first: its meta will claim to be the best, so a kill must not leave it unnamed.
        if best:
            atomic_write(root / "best", target.name + "\n")
        atomic_write(root / "latest", target.name + "\n")
    except OSError as error:
        raise CheckpointError(f"Cannot save step {step} in {root}: {error}") from error
    _retire(root, known, keep, just_saved=target.name)
    return Checkpoint(target, step, meta)


def find(root: Path) -> Checkpoint | None:
    """The newest sound checkpoint in `root`: the one `latest` names, or else the next newest.

    Damaged ones are passed over with a single warning that names them. None if there are no
    checkpoints at all. Raises CheckpointError if there are some and not one is sound.
    """
    folders = _folders(root)
    if not folders:
        return None
    named, problem = _read_pointer(root, "latest")
    complaints = [problem] if problem else []
    by_age = sorted(_manifests(root).items(), key=lambda item: item[1].serial, reverse=True)
    candidates = ([named] if named else []) + [name for name, _ in by_age if name != named]
    # Without a readable manifest there is no age; they come last, to be named in the complaint.
    candidates += [folder.name for folder in folders if folder.name not in candidates]
    for name in candidates:
        problems = verify(root / name)
        if not problems:
            if complaints:
                _log.warning("%s; using %s instead", "; ".join(complaints), root / name)
            return _open(root / name)
        complaints.append(f"checkpoint {name} is damaged ({', '.join(problems)})")
    raise CheckpointError(
        f"No usable checkpoint in {root}: {'; '.join(complaints)}. Move the folder away to start "
        "anew, or restore one of them from a backup."
    )


def resolve(root: Path, resume: str) -> Checkpoint | None:
    """What a run that saves to `root` shall continue from, by `CheckpointConfig.resume`.

    None means: start anew. Raises CheckpointError for 'never' where checkpoints exist, for a path
    at which there is no sound checkpoint, and as `find` does.
    """
    if resume == "auto":
        return find(root)
    if resume == "never":
        if folders := _folders(root):
            raise CheckpointError(
                f"{root} already holds checkpoints (newest: {folders[-1].name}) and the recipe "
                "says resume: never. Choose another run folder, or say resume: auto to continue."
            )
        return None
    return read(Path(resume))


def read(path: Path) -> Checkpoint:
    """The checkpoint at `path`, or the newest sound one in it if `path` holds several.

    Raises CheckpointError naming every problem found.
    """
    if _folders(path):
        found = find(path)
        assert found is not None
        return found
    if problems := verify(path):
        raise CheckpointError(f"{path} is no usable checkpoint: {', '.join(problems)}")
    return _open(path)


def verify(path: Path) -> list[str]:
    """Everything wrong with the checkpoint folder `path`; empty if it is sound. Reads all of it."""
    return _problems(path, read_content=True)


def list_checkpoints(root: Path) -> list[Checkpoint]:
    """The checkpoints in `root` that are complete by size, oldest save first; content is not read.

    After a rewind this order differs from that of steps: an abandoned later step comes earlier.
    """
    by_age = sorted(_manifests(root).items(), key=lambda item: item[1].serial)
    return [
        Checkpoint(root / name, manifest.step, manifest.meta)
        for name, manifest in by_age
        if not _problems(root / name, read_content=False)
    ]


def load_part(checkpoint: Checkpoint, name: str) -> Any:
    """The tree saved as part `name`, on the CPU.

    Raises CheckpointError if there is no such part, if it cannot be read, or if it holds anything
    but tensors and plain values (nothing in it is run).
    """
    path = checkpoint.path / f"{name}.pt"
    if not _PART_NAME.match(name) or not path.is_file():
        parts = ", ".join(sorted(part.stem for part in checkpoint.path.glob("*.pt")))
        raise CheckpointError(f"{checkpoint.path} has no part '{name}'; it has: {parts or 'none'}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it is damaged, or holds more than tensors and plain values "
            f"(found: {_foreign_types(path) or 'nothing that can be named'}), which could run code "
            "when loaded."
        ) from error
    # A damaged archive fails in whatever way the damage suggests: RuntimeError, IndexError, …
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _check_writable(parts: dict[str, Any], manifest: _Manifest) -> None:
    if not parts:
        raise CheckpointError("A checkpoint without parts is not a checkpoint.")
    for name in parts:
        if not _PART_NAME.match(name):
            raise CheckpointError(f"'{name}' cannot be a part's name: use letters, digits, . _ -")
    if manifest.step < 0:
        raise CheckpointError(f"A step is never negative; got {manifest.step}.")
    try:
        _encode(manifest)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"The checkpoint's meta must be plain JSON: {error}") from error


def _write_folder(target: Path, parts: dict[str, Any], manifest: _Manifest) -> None:
    temporary = temporary_beside(target)
    try:
        temporary.mkdir()
        for name, tree in parts.items():
            manifest.files[f"{name}.pt"] = _write_part(temporary / f"{name}.pt", tree)
        _write_durably(temporary / "manifest.json", _encode(manifest))
        fsync_dir(temporary)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_dir(target.parent)


def _write_part(path: Path, tree: Any) -> _File:
    with path.open("wb") as file:
        hashing = _HashingWriter(file)
        try:
            torch.save(tree, hashing)  # pyright: ignore[reportArgumentType]
        except OSError:
            raise
        # torch wraps a full disk in a RuntimeError and lets pickle's many errors through.
        except Exception as error:
            raise CheckpointError(f"Part '{path.stem}' cannot be saved: {error}") from error
        file.flush()
        os.fsync(file.fileno())
    # Better now than on the day the checkpoint is needed.
    if foreign := _foreign_types(path):
        raise CheckpointError(
            f"Part '{path.stem}' holds {foreign}, which cannot be loaded again safely; a part may "
            "hold tensors, numbers, strings and containers of these."
        )
    return _File(bytes=hashing.bytes, sha256=hashing.digest.hexdigest())


class _HashingWriter:
    """Passes writes on and hashes them, which saves reading gigabytes back."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _foreign_types(path: Path) -> str:
    try:
        return ", ".join(sorted(get_unsafe_globals_in_checkpoint(path)))
    # Not torch's own format (a bare pickle, say): there is nothing to list the types of.
    except Exception:
        return ""


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _encode(manifest: _Manifest) -> str:
    body = manifest.model_dump()
    return json.dumps({**body, "checksum": _checksum(body)}, indent=1)


def _checksum(body: dict[str, Any]) -> str:
    # Through JSON and back first: what is checked later has been through it too (1 → "1" as keys).
    plain = json.loads(json.dumps(body))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: Path) -> _Manifest:
    """Raises OSError or ValueError (of which pydantic's ValidationError is one)."""
    body = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    if not isinstance(body, dict):
        raise ValueError("not a JSON object")
    version = body.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(f"format {version} is newer than this program's {FORMAT_VERSION}")
    if body.pop("checksum", None) != _checksum(body):
        raise ValueError("its checksum does not match")
    return _Manifest.model_validate(body)


def _problems(path: Path, *, read_content: bool) -> list[str]:
    if not path.is_dir():
        return ["no such folder"]
    try:
        manifest = _read_manifest(path)
    except FileNotFoundError:
        return ["manifest.json is missing"]
    except (OSError, ValueError) as error:
        reason = "not as expected" if isinstance(error, ValidationError) else str(error)
        return [f"manifest.json is unreadable: {reason}"]
    files = manifest.files.items()
    found = [_file_problem(path / name, file, read_content) for name, file in files]
    return [problem for problem in found if problem]


def _file_problem(path: Path, expected: _File, read_content: bool) -> str | None:
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


def _open(path: Path) -> Checkpoint:
    manifest = _read_manifest(path)
    return Checkpoint(path, manifest.step, manifest.meta)


def _folders(root: Path) -> list[Path]:
    """Everything in `root` named like a checkpoint, by step and revision."""
    if not root.is_dir():
        return []
    matches = [match for entry in root.iterdir() if (match := _FOLDER.match(entry.name))]
    matches.sort(key=lambda match: (int(match["step"]), int(match["revision"] or 0)))
    return [root / match.string for match in matches]


def _manifests(root: Path) -> dict[str, _Manifest]:
    """The manifests that can be read, by folder name."""
    manifests = {}
    for folder in _folders(root):
        try:
            manifests[folder.name] = _read_manifest(folder)
        except (OSError, ValueError):
            continue
    return manifests


def _free_name(root: Path, step: int) -> str:
    name, revision = f"step-{step:08d}", 0
    while (root / name).exists():
        revision += 1
        name = f"step-{step:08d}.{revision}"
    return name


def _read_pointer(root: Path, pointer: str) -> tuple[str | None, str | None]:
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


def _retire(root: Path, known: dict[str, _Manifest], keep: int, *, just_saved: str) -> None:
    """Delete what the rule does not keep: an older copy of a kept step, and the older steps.

    Damaged folders are neither counted nor deleted: someone may want to rescue something.
    """
    best, _ = _read_pointer(root, "best")
    kept_steps = {_step_of(just_saved)}
    for name in sorted(known, key=lambda name: known[name].serial, reverse=True):
        if _problems(root / name, read_content=False):
            continue
        if len(kept_steps) < keep and known[name].step not in kept_steps:
            kept_steps.add(known[name].step)
            continue
        if name == best:
            continue
        try:
            remove_tree(root / name)
        except OSError as error:
            _log.warning("cannot remove the old checkpoint %s: %s", root / name, error)


def _step_of(folder_name: str) -> int:
    match = _FOLDER.match(folder_name)
    assert match is not None
    return int(match["step"])
