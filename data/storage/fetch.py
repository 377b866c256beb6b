"""Fetching a file in spite of failures: tried again, continued where it broke off, verified."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

from data.errors import DataError
from data.shards.pieces import Piece
from data.storage.remote import Source, Unreachable

LONGEST_WAIT_S = 60
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Retry:
    """How often to try again, and how long to wait first; each wait is twice the one before."""

    times: int
    wait_s: float

    def run(
        self,
        attempt: Callable[[], _Result],
        what: str,
        stopped: Callable[[], bool] = lambda: False,
    ) -> _Result:
        """Return the first result of `attempt` that is not an exception.

        Raises DataError, naming `what` and the last reason, once every try has failed, one failed
        for good, or `stopped` became true.
        """
        tried = 0
        while True:
            try:
                return attempt()
            except DataError:
                raise
            # Each library raises its own kinds.
            except Exception as error:
                tried += 1
                if tried > self.times or isinstance(error, Unreachable) or stopped():
                    tries = "once" if tried == 1 else f"{tried} times"
                    raise DataError(
                        f"{what} cannot be read (tried {tries}; the last time: {_reason(error)}); "
                        "check data.path and that the place can be reached from this machine"
                    ) from error
            _pause(min(LONGEST_WAIT_S, self.wait_s * 2 ** (tried - 1)), stopped)


def _pause(seconds: float, stopped: Callable[[], bool]) -> None:
    # Without chance in it, all ranks that failed together would come back together.
    until = time.monotonic() + seconds * random.SystemRandom().uniform(0.5, 1)
    while (left := until - time.monotonic()) > 0 and not stopped():
        time.sleep(min(0.2, left))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class Download:
    """A piece of a shard on its way into a file; what came is kept when the connection breaks."""

    def __init__(
        self,
        source: Source,
        name: str,
        piece: Piece,
        stream: BinaryIO,
        stopped: Callable[[], bool],
    ) -> None:
        self._stopped = stopped
        self._source = source
        self._name = name
        self._piece = piece
        self._stream = stream
        self._start_over()

    def _start_over(self) -> None:
        self._stream.seek(0)
        self._done = 0
        self._digest = hashlib.sha256()

    def go_on(self) -> None:
        """Read to the end, and compare size and SHA-256 with the manifest.

        Raises DataError where the file cannot be written or the fetch was stopped, and any
        Exception where the source failed or sent other bytes than the manifest describes.
        """
        # A whole file is read to its end, wherever that is.
        end = None if self._piece.is_whole else self._piece.end
        for chunk in self._source.chunks(self._name, self._piece.first + self._done, end):
            if self._stopped():
                raise DataError(f"{self._name} is not wanted any more")
            self._done += len(chunk)
            if self._done > self._piece.bytes:
                break
            self._write(chunk)
        if self._done == self._piece.bytes and self._digest.hexdigest() == self._piece.sha256:
            return
        size = f"{'more than ' * (self._done > self._piece.bytes)}{self._piece.bytes:,}"
        came = size if self._done >= self._piece.bytes else f"{self._done:,}"
        self._start_over()
        raise ConnectionError(
            f"the {came} bytes that came are not the {self._piece.bytes:,} of the manifest "
            "(size or SHA-256 differ)"
        )

    def _write(self, chunk: bytes) -> None:
        try:
            self._stream.write(chunk)
        except OSError as error:
            raise DataError(
                f"{self._piece.name} cannot be kept in data.cache_dir ({error.strerror}); "
                "make room there, lower data.cache_gb, or name another folder"
            ) from error
        self._digest.update(chunk)
