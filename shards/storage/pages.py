"""Read the links on the web page with which an HTTP server lists a folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import urljoin, urlsplit

from shards.errors import ShardError

_LINK = re.compile(rb"<a\s[^>]{0,2000}?href\s{0,9}=\s{0,9}[\"']([^\"'>]{1,4096})[\"']", re.IGNORECASE)

_MAX_WALK_BYTES = 512 << 20  # of all pages of a folder tree, which may have no end
_MIN_PAGE_BYTES = 4096  # counted for each page


def list_links(page: bytes, url: str) -> list[str]:
    """Return the sorted names of the files and folders directly below ``url`` that its page links to.

    The names are percent-encoded as on the page; those of folders end with a slash.
    """
    base = urlsplit(url)
    folder = base.path.rstrip("/") + "/"
    names = set()
    for match in _LINK.finditer(page):
        try:
            link = urlsplit(urljoin(f"{base.scheme}://{base.hostname}{folder}", match[1].decode()))
        except ValueError:
            continue
        is_same_host = link.scheme in ("http", "https") and link.hostname == base.hostname
        name = link.path.removeprefix(folder)
        is_below = link.path.startswith(folder) and name.strip("/") and "/" not in name.rstrip("/")
        if is_same_host and is_below and name.rstrip("/") not in (".", ".."):
            names.add(name)
    return sorted(names)


def walk_pages(list_page: Callable[[str, int], tuple[list[str], int]], max_page_bytes: int) -> list[str]:
    """Return the sorted names of all files that the pages of a folder and of the folders below it link to.

    Args:
        list_page: returns the links of a folder's page, as ``list_links``, and the page's length; it raises a
            ShardError for a page that is missing or longer than its second argument.

    Raises:
        ShardError: as ``list_page`` for the top folder; a page below it may be missing.
    """
    names: list[str] = []
    folders, room = [""], _MAX_WALK_BYTES
    for folder in folders:  # the loop appends to it
        try:
            links, num_bytes = list_page(folder, max(0, min(room, max_page_bytes)))
        except ShardError as error:
            if folder and isinstance(error.__cause__, FileNotFoundError):
                continue
            raise
        room -= max(num_bytes, _MIN_PAGE_BYTES)
        paths = [f"{folder}/{link}" if folder else link for link in links]
        folders += [path.rstrip("/") for path in paths if path.endswith("/")]
        names += [path for path in paths if not path.endswith("/")]
    return sorted(names)
