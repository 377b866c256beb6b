"""Opening a split, wherever it is."""

from __future__ import annotations

from pathlib import Path

from data.config import DataConfig
from data.storage.remote import is_remote
from data.storage.remote_store import RemoteStore
from data.storage.store import LocalStore, Store


def open_store(config: DataConfig, split: str, window: int) -> Store:
    """Open one split of `config.path`: a folder, a URL or `pipe:COMMAND`.

    Training reads `window` samples at a time in mixed order, whatever shards they lie in. Raises
    DataError where nothing is packed, what cannot be reached, or files that do not fit together.
    """
    if is_remote(str(config.path)):
        return RemoteStore(config, split, window)
    return LocalStore(Path(config.path) / split, window)
