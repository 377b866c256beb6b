"""Copies of a run's checkpoints behind a URL: made in the background, verified, used at a start.

The mirror looks like the folder of checkpoints itself. A checkpoint's manifest is written last,
once every file was read back and had the SHA-256 that it was written with: without it there is no
checkpoint. The rules of retention hold there as well. Whatever goes wrong is a warning and tried
again: the run has its own checkpoints.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import tempfile
import threading
from pathlib import Path
from typing import Any

from data.files import temporary_beside
from data.storage.remote import is_remote, open_source, package_of, without_secrets
from launcher.checkpoints.checkpoint import find, list_checkpoints
from launcher.checkpoints.manifest import (
    CheckpointError,
    Manifest,
    Written,
    folder_names,
    folders,
    free_name,
    manifests,
    read_manifest,
)
from launcher.checkpoints.retention import superfluous, updated_front
from launcher.checkpoints.write import discard, finish_folder
from launcher.errors import UsageError

_log = logging.getLogger("scl.checkpoint")
_SILENT_S = 60
_FIRST_WAIT_S, _LONGEST_WAIT_S = 5.0, 300.0
_REFUSALS = ("NoCredentialsError", "CredentialRetrievalError", "DefaultCredentialsError")


class Place:
    """The checkpoints behind an fsspec URL."""

    def __init__(self, url: str, silent_s: float = _SILENT_S) -> None:
        """No byte for `silent_s` is a failure. Raises UsageError where nothing reads the URL."""
        _check_package(url)
        self.name = without_secrets(url)
        self._url = url.rstrip("/")
        self._silent_s = silent_s

    def manifests(self) -> dict[str, Manifest]:
        """Of the checkpoints that are complete, by name, oldest save first."""
        with tempfile.TemporaryDirectory() as folder:
            for name in self._names():
                target = Path(folder) / name / "manifest.json"
                target.parent.mkdir()
                try:
                    target.write_bytes(self.read(f"{name}/manifest.json"))
                # One that is only half there has none.
                except Exception:
                    continue
            return manifests(Path(folder))

    def read(self, name: str) -> bytes:
        return b"".join(open_source(self._url, self._silent_s).chunks(name, 0))

    def put(self, folder: Path, manifest: Manifest) -> None:
        """Copy a checkpoint, read it back, and only then give it its manifest."""
        for name, written in manifest.files.items():
            self._write(f"{folder.name}/{name}", folder / name)
            if self._digest(f"{folder.name}/{name}") != written:
                raise ConnectionError(f"{folder.name}/{name} came back otherwise than it was sent")
        self._write(f"{folder.name}/manifest.json", folder / "manifest.json")

    def fetch(self, name: str, manifest: Manifest, root: Path) -> None:
        """Bring a checkpoint into `root`. Raises where it is not what its manifest says."""
        # What is here of that name is damaged: kept, for whoever wants to rescue something.
        wanted = root / free_name(root, manifest.step)
        target = temporary_beside(wanted)
        target.mkdir(parents=True)
        try:
            for file, written in manifest.files.items():
                with (target / file).open("wb") as stream:
                    if self._digest(f"{name}/{file}", stream) != written:
                        raise ConnectionError(f"{name}/{file} is not what was saved")
            finish_folder(target, wanted, manifest)
        except BaseException:
            discard(target)
            raise

    def remove(self, name: str) -> None:
        """Also what is only half there."""
        system, root = self._open()
        # Without its manifest it is no checkpoint any more, however far the rest comes.
        with contextlib.suppress(FileNotFoundError):
            system.rm_file(f"{root}/{name}/manifest.json")
        with contextlib.suppress(FileNotFoundError):
            system.rm(f"{root}/{name}", recursive=True)

    def _names(self) -> list[str]:
        system, root = self._open()
        try:
            found = system.ls(root, detail=False)
        except FileNotFoundError:
            return []
        return folder_names(str(path).rstrip("/").rpartition("/")[2] for path in found)

    def _open(self) -> tuple[Any, str]:
        import fsspec.core

        system, root = fsspec.core.url_to_fs(self._url)
        system.invalidate_cache()
        return system, root.rstrip("/")

    def _write(self, name: str, path: Path) -> None:
        system, root = self._open()
        target = f"{root}/{name}"
        system.makedirs(target.rpartition("/")[0], exist_ok=True)
        system.put_file(str(path), target)

    def _digest(self, name: str, stream: Any = None) -> Written:
        digest, size = hashlib.sha256(), 0
        for chunk in open_source(self._url, self._silent_s).chunks(name, 0):
            digest.update(chunk)
            size += len(chunk)
            if stream is not None:
                stream.write(chunk)
        return Written(bytes=size, sha256=digest.hexdigest())


def _check_package(url: str) -> None:
    package = package_of(url) if is_remote(url) else None
    if package is None:
        raise UsageError(
            f"checkpoint.mirror: nothing here writes to {without_secrets(url)}: give a URL that "
            "fsspec knows, such as s3://bucket/folder or file:///folder"
        )
    if importlib.util.find_spec(package) is None:
        raise UsageError(
            f"checkpoint.mirror: {without_secrets(url)} needs the package {package}: "
            f"pip install {package}"
        )


def bring_newest(root: Path, url: str, resume: str) -> None:
    """Before a start: bring the newest sound checkpoint here, if the mirror has a newer one.

    Raises what `_newer` does.
    """
    place = Place(url)
    for name, manifest in _newer(place, root, resume):
        try:
            place.fetch(name, manifest, root)
            _log.warning("continuing with %s of the mirror %s", name, place.name)
            return
        except Exception as error:
            _log.warning("%s of the mirror %s is passed over: %s", name, place.name, _reason(error))


def newest_there(root: Path, url: str, resume: str) -> str | None:
    """The checkpoint that `bring_newest` would bring, if it is sound; nothing is brought.

    Raises what `_newer` does.
    """
    return next((name for name, _ in _newer(Place(url), root, resume)), None)


def _newer(place: Place, root: Path, resume: str) -> list[tuple[str, Manifest]]:
    """What the mirror has that is newer than every sound checkpoint here, newest first.

    Raises UsageError where the mirror cannot be used at all, CheckpointError where it cannot say
    whether there is anything to continue and neither is there anything here.
    """
    here = _newest_serial(root)
    try:
        known = place.manifests()
    # Each library raises its own kinds.
    except Exception as error:
        if isinstance(error, PermissionError) or type(error).__name__ in _REFUSALS:
            raise UsageError(
                f"checkpoint.mirror: {place.name} cannot be used: {_reason(error)}; check its "
                "credentials, or leave it out"
            ) from error
        if here or resume != "auto":
            _log.warning("checkpoint.mirror: %s does not answer: %s", place.name, _reason(error))
            return []
        raise CheckpointError(
            f"checkpoint.mirror: {place.name} does not say whether it has checkpoints to continue "
            f"({_reason(error)}), and {root} has none: try again, or say checkpoint.mirror=null"
        ) from error
    if resume == "never" and known:
        raise CheckpointError(
            f"checkpoint.mirror: {place.name} already holds checkpoints and the recipe says "
            "resume: never: choose another place, or say resume: auto to continue"
        )
    if resume != "auto":
        return []
    return [(name, known[name]) for name in reversed([*known]) if known[name].serial > here]


def _newest_serial(root: Path) -> int:
    """Of the newest sound checkpoint here; 0 where there is none."""
    try:
        found = find(root)
    except CheckpointError as error:
        _log.warning("%s", error)
        return 0
    return 0 if found is None else read_manifest(found.path).serial


class Mirror:
    """A thread that keeps the mirror like the folder `root`; on rank 0."""

    def __init__(self, root: Path, url: str, *, keep: int, keep_pareto: int) -> None:
        self._root, self._place = root, Place(url)
        self._keep, self._keep_pareto = keep, keep_pareto
        self._asked = threading.Event()
        self._closing = threading.Event()
        self._behind = False
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def copy_soon(self) -> None:
        """Say that there may be something new."""
        self._behind = True
        self._asked.set()

    def close(self, within_s: float) -> None:
        """Copy what there is, for at most so long."""
        self._closing.set()
        self._asked.set()
        self._thread.join(within_s)
        if self._behind:
            _log.warning(
                "the mirror %s has not got the newest checkpoint: the next start copies it",
                self._place.name,
            )

    def _work(self) -> None:
        wait = _FIRST_WAIT_S
        while True:
            self._asked.wait()
            self._asked.clear()
            try:
                self._behind = False
                self._copy()
                wait = _FIRST_WAIT_S
            # A mirror that fails never ends a run, whatever its library raises.
            except Exception as error:
                self._behind = True
                _log.warning(
                    "the mirror %s is behind, and is tried again: %s",
                    self._place.name,
                    _reason(error),
                )
                if not self._closing.is_set():
                    self._closing.wait(wait)
                    wait = min(2 * wait, _LONGEST_WAIT_S)
                    self._asked.set()
                    continue
            if self._closing.is_set() and not self._asked.is_set():
                return

    def _copy(self) -> None:
        there = self._place.manifests()
        for here in reversed(list_checkpoints(self._root)):
            manifest = read_manifest(here.path)
            known = there.get(here.path.name)
            if known is None or known.serial != manifest.serial:
                if known is not None:
                    self._place.remove(here.path.name)
                if self._put(here.path, manifest):
                    there[here.path.name] = manifest
        there = dict(sorted(there.items(), key=lambda item: item[1].serial))
        front = updated_front(self._root, there)
        rules = {"keep": self._keep, "keep_pareto": self._keep_pareto}
        for name in superfluous(there, front, **rules):
            self._place.remove(name)

    def _put(self, folder: Path, manifest: Manifest) -> bool:
        """Copy it; False where it was retired meanwhile, and nothing of it is left there."""
        try:
            self._place.put(folder, manifest)
        except FileNotFoundError:
            if folder in folders(self._root):
                raise
            self._place.remove(folder.name)
            return False
        return True


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
