"""Where the files of one split are, and how its shards get ready to be read."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol

import psutil
from pydantic import ValidationError

from data.config import DataConfig
from data.errors import DataError
from data.files import atomic_file, remove_leftovers, sha256_of
from data.shards.manifest import INDEX_NAME, MANIFEST_NAME, Manifest, load_manifest, verify_shards
from data.storage.ahead import Ahead, Stretch
from data.storage.cache import ShardCache
from data.storage.fetch import Retry, ShardDownload
from data.storage.remote import Source, is_remote, open_source, without_secrets

_BLOCK = 8 << 20


class Store(Protocol):
    """The files of one split. Pickles: data workers get a copy.

    `name` is the split's place as it stands in messages; manifest and index are in `folder`;
    `shards` says where each shard is once it is ready, in the manifest's order.
    """

    name: str
    folder: Path
    manifest: Manifest
    shards: list[Path]

    def ahead(self, stretches: Callable[[int], list[Stretch]], end: int) -> Ahead:
        """What makes shards ready, stage by stage, for a stream that begins now."""
        ...


def open_store(config: DataConfig, split: str, window: int) -> Store:
    """Open one split of `config.path`: a folder, a URL or `pipe:COMMAND`.

    Training reads `window` samples at a time in mixed order, whatever shards they lie in. Raises
    DataError where nothing is packed, what cannot be reached, or files that do not fit together.
    """
    if is_remote(str(config.path)):
        return RemoteStore(config, split, window)
    return LocalStore(Path(config.path) / split, window)


class LocalStore:
    """A split in a folder of this machine's file systems."""

    def __init__(self, folder: Path, window: int) -> None:
        self._window = window
        self.name = str(folder)
        self.folder = folder
        self.manifest = load_manifest(folder)
        verify_shards(folder, self.manifest)
        self.shards = [folder / shard.name for shard in self.manifest.shards]

    def ahead(self, stretches: Callable[[int], list[Stretch]], end: int) -> Ahead:
        """Ask the kernel for long stretches, front to back, before workers pick from them."""
        # What does not fit into memory would be read twice; a small set is read in no time.
        in_flight = 2 * bytes_in_flight(self.manifest, self._window)
        big = self.manifest.samples > self._window
        useful = big and in_flight < psutil.virtual_memory().available
        return Ahead(
            stretches if useful else lambda _: [], end, self._read_ahead, threads=2, wait=False
        )

    def _read_ahead(
        self, stretch: Stretch, urgent: Callable[[], bool], stopped: Callable[[], bool]
    ) -> Callable[[], None]:
        read_ahead(self.shards[stretch.shard], stopped, stretch.first, stretch.end)
        return _nothing


def read_ahead(
    path: Path,
    stopped: Callable[[], bool] = lambda: False,
    first: int = 0,
    end: int | None = None,
) -> None:
    """Ask the kernel to read bytes `first` to `end` of a file into its cache, front to back."""
    # Only a hint: a shard that cannot be opened is reported by the worker that reads it.
    with contextlib.suppress(OSError), path.open("rb") as stream:
        end = os.fstat(stream.fileno()).st_size if end is None else end
        for start in range(first, end, _BLOCK):
            if stopped():
                return
            length = min(_BLOCK, end - start)
            os.posix_fadvise(stream.fileno(), start, length, os.POSIX_FADV_WILLNEED)


def _nothing() -> None:
    pass


class RemoteStore:
    """A split behind a URL or a command; its shards come through a cache on this machine."""

    def __init__(self, config: DataConfig, split: str, window: int) -> None:
        self._window = window
        path = str(config.path)
        self.name = f"{without_secrets(path)}/{split}"
        self._split = split
        self._config = config
        self._retry = Retry(config.retries, config.retry_wait_s)
        cache_dir = config.cache_dir or _default_cache_dir()
        self._cache = ShardCache(cache_dir.expanduser(), int(config.cache_gb * 1e9))
        place = hashlib.sha256(f"{path} {split}".encode()).hexdigest()[:16]
        self.folder = self._cache.folder / "sets" / place
        self._fetch_description(self._source(), place)
        self.manifest = load_manifest(self.folder)
        self._check_limit()
        self._cache.clean()
        self.shards = [self._cache.path(shard) for shard in self.manifest.shards]

    def _source(self) -> Source:
        return open_source(str(self._config.path), self._config.fetch_timeout_s)

    def _fetch_description(self, source: Source, place: str) -> None:
        """Bring manifest and index here, the index only if it is not the one that is here."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._cache.alone(place):
            remove_leftovers(self.folder)
            self._fetch_file(source, MANIFEST_NAME, _check_manifest)
            wanted = load_manifest(self.folder).index_sha256

            def check_index(content: bytes) -> None:
                if hashlib.sha256(content).hexdigest() != wanted:
                    raise ConnectionError("it is not the one the manifest was written with")

            index = self.folder / INDEX_NAME
            if not index.is_file() or sha256_of(index) != wanted:
                self._fetch_file(source, INDEX_NAME, check_index)

    def _fetch_file(self, source: Source, name: str, check: Callable[[bytes], None]) -> None:
        def attempt() -> bytes:
            content = b"".join(source.chunks(f"{self._split}/{name}", 0))
            check(content)
            return content

        content = self._retry.run(attempt, f"{self.name}/{name}")
        with atomic_file(self.folder / name) as stream:
            stream.write(content)

    def _check_limit(self) -> None:
        needed = bytes_in_flight(self.manifest, self._window)
        limit = self._config.cache_gb * 1e9
        if needed > limit:
            raise DataError(
                f"data.cache_gb is {self._config.cache_gb:g}, but {self.name} is read from "
                f"{needed / 1e9:.3g} GB of shards at a time; give it at least that, better twice"
            )

    def ahead(self, stretches: Callable[[int], list[Stretch]], end: int) -> Ahead:
        """Fetch shards into the cache, several at a time, and keep them there while needed."""
        threads = self._config.fetch_ahead
        return Ahead(stretches, end, self._fetch, threads=threads, wait=True)

    def _fetch(
        self, stretch: Stretch, urgent: Callable[[], bool], stopped: Callable[[], bool]
    ) -> Callable[[], None] | None:
        # Whole, because that is what the manifest has a checksum of.
        info = self.manifest.shards[stretch.shard]

        def fill(stream: BinaryIO) -> None:
            name = f"{self._split}/{info.name}"
            download = ShardDownload(self._source(), name, info, stream, stopped)
            self._retry.run(download.go_on, f"{self.name}/{info.name}", stopped)

        return self._cache.bring(info, fill, urgent, stopped)


def _check_manifest(content: bytes) -> None:
    try:
        Manifest.model_validate_json(content)
    except ValidationError as error:
        raise ConnectionError(f"it is not a valid manifest: {error.errors()[0]['msg']}") from error


def bytes_in_flight(manifest: Manifest, window: int) -> int:
    """Bytes of the shards that one window of the training order is read from, about."""
    sizes = [shard.bytes for shard in manifest.shards]
    share = min(1.0, window / max(1, manifest.samples))
    # A window begins and ends inside a shard.
    return min(sum(sizes), round(share * sum(sizes)) + 2 * max(sizes, default=0))


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "scl" / "shards"
