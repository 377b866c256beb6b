"""A split that is elsewhere: its description is fetched, its shards come through a cache."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from data.config import DataConfig
from data.errors import DataError
from data.files import atomic_file, remove_leftovers, sha256_of
from data.shards.manifest import INDEX_NAME, MANIFEST_NAME, Manifest, load_manifest
from data.shards.pieces import PIECES_NAME, Piece, may_be_cut, parse_pieces, pieces_of, whole
from data.storage.ahead import Ahead, Stretch
from data.storage.cache import ShardCache
from data.storage.cached import CachedShards
from data.storage.fetch import Download, Retry
from data.storage.reader import Places
from data.storage.remote import Source, Unreachable, open_source, without_secrets
from data.storage.store import bytes_in_flight

_log = logging.getLogger("data")


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
        pieces = self._pieces() or whole(self.manifest.shards)
        self._shards = CachedShards(self._cache, pieces, self._fetch)
        self.places: Places = self._shards

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

    def _pieces(self) -> list[list[Piece]] | None:
        """The pieces that the shards may be fetched in; None where they come whole."""
        if not any(map(may_be_cut, self.manifest.shards)):
            return None
        source, name = self._source(), f"{self._split}/{PIECES_NAME}"
        place = f"{self.name}/{PIECES_NAME}"
        content = self._retry.run(partial(_content_of, source, name), place)
        if content is None:
            return None
        found = pieces_of(self.manifest.shards, parse_pieces(content, place))
        if found is None:
            _log.warning(
                "%s is of other shards, so shards are fetched whole; write it anew with `scl pack "
                "pieces`, and put it beside them",
                place,
            )
            return None
        probe = partial(source.has_ranges, f"{self._split}/{found[0][0].name}")
        return found if self._retry.run(probe, self.name) else None

    def ahead(self, stretches: Callable[[int], list[Stretch]], end: int) -> Ahead:
        """Fetch shards into the cache, several at a time, and keep them there while needed."""
        shards = self._shards
        return Ahead(
            lambda stage: shards.pieces_in(stretches(stage)),
            end,
            shards.prepare,
            threads=self._config.fetch_ahead,
            wait=True,
        )

    def _fetch(self, piece: Piece, stopped: Callable[[], bool], stream: BinaryIO) -> None:
        name = f"{self._split}/{piece.name}"
        download = Download(self._source(), name, piece, stream, stopped)
        self._retry.run(download.go_on, f"{self.name}/{piece.name}", stopped)


def _content_of(source: Source, name: str) -> bytes | None:
    """A file of pieces as it was sent, whole; None where there is none."""
    try:
        content = b"".join(source.chunks(name, 0))
    except Unreachable:
        return None
    try:
        parse_pieces(content, "it")
    except DataError as error:
        raise ConnectionError(str(error)) from error
    return content


def _check_manifest(content: bytes) -> None:
    try:
        Manifest.model_validate_json(content)
    except ValidationError as error:
        raise ConnectionError(f"it is not a valid manifest: {error.errors()[0]['msg']}") from error


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "scl" / "shards"
