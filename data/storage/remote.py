"""Reading files that are elsewhere: over HTTP, from an object store, or out of a command."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import re
import shlex
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.client import HTTPResponse
from typing import Protocol, TypeVar
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from data.errors import DataError

PIPE = "pipe:"
CHUNK = 4 << 20
_URL = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# Answers that will be the same next time; 408, 425 and 429 ask for another try.
_FINAL = frozenset({400, 401, 403, 404, 405, 410, 451})
_Result = TypeVar("_Result")


class Unreachable(Exception):
    """A failure that trying again will not mend."""


class Source(Protocol):
    """A place that holds files by name, such as `train/shard-000000.tar`."""

    def chunks(self, name: str, start: int, end: int | None = None) -> Iterator[bytes]:
        """Yield the file's bytes `start` to `end` (exclusive; None: all that follow).

        Raises any Exception when they stop early.
        """
        ...

    def has_ranges(self, name: str) -> bool:
        """Whether a part of this file is sent without the rest; raises as `chunks` does."""
        ...


def is_remote(path: str) -> bool:
    """Whether `path` is a URL or `pipe:COMMAND`, not a folder of this machine."""
    return path.startswith(PIPE) or _URL.match(path) is not None


def without_secrets(path: str) -> str:
    """The URL as it may stand in a log: without user, password and query."""
    if path.startswith(PIPE):
        return path
    parts = urlsplit(path)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def open_source(path: str, timeout_s: float) -> Source:
    """The source behind a URL or `pipe:COMMAND`; no byte for `timeout_s` is a failure.

    Raises DataError where nothing reads that protocol, the package for it is missing, or a command
    has no `{}`.
    """
    scheme = path.partition(":")[0].lower()
    factory = {"http": _Http, "https": _Http, "pipe": _Pipe}.get(scheme, _Fsspec)
    return factory(path, timeout_s)


class _Http:
    # urllib and not fsspec's aiohttp: its time-out is one of silence, and it needs no event loop.
    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = urlsplit(url)
        self._timeout_s = timeout_s

    def chunks(self, name: str, start: int, end: int | None = None) -> Iterator[bytes]:
        is_part = start > 0 or end is not None
        with self._answer(name, (start, end) if is_part else None) as response:
            length = response.headers.get("Content-Length")
            left = int(length) if length is not None else None
            # A server that knows no ranges sends the whole file.
            place = start if response.status == 206 else 0
            while chunk := response.read(CHUNK):
                left = None if left is None else left - len(chunk)
                yield _part(chunk, place, start, end)
                place += len(chunk)
                if end is not None and place >= end:
                    return
            if left:
                raise ConnectionError(f"the connection closed {left:,} bytes before the end")

    def has_ranges(self, name: str) -> bool:
        with self._answer(name, (0, 1)) as response:
            return response.status == 206

    def _answer(self, name: str, part: tuple[int, int | None] | None) -> HTTPResponse:
        path = f"{self._url.path.rstrip('/')}/{quote(name)}"
        request = Request(urlunsplit(self._url._replace(path=path)), headers={"User-Agent": "scl"})
        if part is not None:
            first, end = part
            request.add_header("Range", f"bytes={first}-{'' if end is None else end - 1}")
        try:
            return urlopen(request, timeout=self._timeout_s)
        except HTTPError as error:
            # The error keeps its connection open for as long as anyone holds it.
            error.close()
            kind = Unreachable if error.code in _FINAL else ConnectionError
            raise kind(f"the server answers {error.code} {error.reason}") from None


class _Fsspec:
    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url
        self._timeout_s = timeout_s
        _check_package(url)

    def chunks(self, name: str, start: int, end: int | None = None) -> Iterator[bytes]:
        import fsspec.core

        def begin():
            system, root = fsspec.core.url_to_fs(self._url)
            stream = system.open(f"{root.rstrip('/')}/{name}", "rb", cache_type="none")
            stream.seek(start)
            return stream

        try:
            stream = _within(self._timeout_s, begin)
        except (FileNotFoundError, PermissionError) as error:
            raise Unreachable(" ".join(str(error).split())) from error
        # A thread that hangs in a read would hang in close as well: it is left to itself.
        place = start
        while chunk := _within(self._timeout_s, partial(stream.read, _next_size(place, end))):
            yield chunk
            place += len(chunk)
        stream.close()

    def has_ranges(self, name: str) -> bool:
        # What fsspec opens it can read from anywhere.
        return True


def _part(chunk: bytes, place: int, start: int, end: int | None) -> bytes:
    """Of a chunk that begins at byte `place` of a file: what lies from `start` to `end`."""
    return chunk[max(0, start - place) : None if end is None else max(0, end - place)]


def _next_size(place: int, end: int | None) -> int:
    return CHUNK if end is None else min(CHUNK, end - place)


def package_of(url: str) -> str | None:
    """The package by which fsspec reads a URL; None where it knows no such scheme."""
    from fsspec.registry import known_implementations

    known = known_implementations.get(url.partition(":")[0].lower())
    return known["class"].partition(".")[0] if known else None


def _check_package(url: str) -> None:
    scheme, package = url.partition(":")[0].lower(), package_of(url)
    if package is None:
        raise DataError(
            f"data.path {without_secrets(url)}: nothing here reads {scheme}://; "
            "use a folder, http(s)://, s3://, gs:// or pipe:COMMAND"
        )
    if importlib.util.find_spec(package) is None:
        raise DataError(
            f"data.path {without_secrets(url)} needs the package {package}: "
            f"install it with `pip install {package}`"
        )


class _Pipe:
    def __init__(self, path: str, timeout_s: float) -> None:
        self._command = path.removeprefix(PIPE)
        self._timeout_s = timeout_s
        if "{}" not in self._command:
            raise DataError(
                f"data.path {path} has no {{}} to put the file's name in; write it as "
                "`pipe:COMMAND … {}`"
            )

    def chunks(self, name: str, start: int, end: int | None = None) -> Iterator[bytes]:
        with tempfile.TemporaryFile() as complaints:
            process = subprocess.Popen(
                ["/bin/sh", "-c", self._command.replace("{}", shlex.quote(name))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=complaints,
                start_new_session=True,
            )
            assert process.stdout is not None
            read = process.stdout.read1  # type: ignore[attr-defined]
            try:
                place = 0
                while chunk := _within(self._timeout_s, lambda: read(CHUNK)):
                    yield chunk[
                        max(0, start - place) : None if end is None else max(0, end - place)
                    ]
                    place += len(chunk)
                    if end is not None and place >= end:
                        return
                if process.wait(self._timeout_s):
                    raise ConnectionError(_complaint(process.returncode, complaints))
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def has_ranges(self, name: str) -> bool:
        # A command writes all of a file.
        return False


def _complaint(code: int, complaints) -> str:
    complaints.seek(0)
    lines = complaints.read().decode(errors="replace").strip().splitlines()
    return f"the command ended with code {code}" + (f": {lines[-1]}" if lines else "")


def _within(seconds: float, call: Callable[[], _Result]) -> _Result:
    """The result of `call`; TimeoutError if it takes longer, and then its thread is abandoned."""
    results: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((call(), None))
        except BaseException as error:
            results.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"nothing came for {seconds:g} s") from None
    if error is not None:
        raise error
    return result
