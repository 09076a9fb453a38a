"""Opening the index files of a set, on a local disk or in a store."""

from __future__ import annotations

import logging
from pathlib import Path

from shards.format.records import DamagedIndexError, Index, open_bytes, unreadable_index
from shards.reading.local_files import LocalFile
from shards.storage.store import Store

logger = logging.getLogger(__name__)


def open_local_index(path: Path) -> Index:
    file = LocalFile(path)
    try:
        return Index.open(file.read, file.num_bytes(), str(path))
    except OSError as error:
        raise unreadable_index(path, error) from error


def fetch_index(store: Store, name: str, max_bytes: int) -> Index:
    """Fetch an index; damage to some of its blocks is no error if it remains after the store's retries."""
    opened: list[Index] = []

    def parse(content: bytes) -> None:
        opened[:] = [open_bytes(content, store.url_of(name))]
        opened[0].records()

    try:
        store.load(name, parse, max_bytes)
    except DamagedIndexError as error:
        logger.warning("%s", error)
    return opened[0]
