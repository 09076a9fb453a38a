"""Credentials in URLs: kept out of everything that is shown or written, and taken from ``~/.netrc``.

The user and password before the host and the query after the path can hold secrets, such as
``https://user:password@host/set`` or ``https://host/set?X-Amz-Signature=...``.
"""

from __future__ import annotations

import logging
import netrc
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

logger = logging.getLogger(__name__)

_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*://"
_LOGIN = re.compile(rf"({_SCHEME})([^\s/?#]*)@")
_QUERY = re.compile(rf"({_SCHEME}[^\s?#]*)[?#]\S*?(?=['\"`)\]}}>,;:.]*(?:\s|\Z))")


def strip_credentials(url: str) -> str:
    """Return a URL without password, query and fragment; a path is returned unchanged.

    A user without a password remains where it names an account or a machine's user (``abfs://container@account``);
    over HTTP it may be a token and is removed.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    return _strip_login(f"{scheme}://{re.split('[?#]', rest, maxsplit=1)[0]}")


def strip_from_text(text: str) -> str:
    """Return a text with the credentials of all URLs in it removed; queries are replaced by ``?...``."""
    return _strip_login(_QUERY.sub(r"\1?...", text)) if "://" in text else text


def strip_values(value: Any) -> Any:
    """Return nested settings in which each text that is a URL has no credentials."""
    if isinstance(value, dict):
        return {key: strip_values(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [strip_values(each) for each in value]
    return strip_credentials(value) if isinstance(value, str) else value


def split_query(url: str) -> tuple[str, str]:
    """Return an HTTP URL without its query and fragment, and the query."""
    path, _, query = url.partition("#")[0].partition("?")
    return path, query


def add_netrc_login(url: str) -> str:
    """Return an HTTP URL with the user and password that ``~/.netrc`` (or ``$NETRC``) has for its host.

    A URL with a user of its own is returned unchanged. The entry ``default`` is not used, because shard sets from
    others may name any host.
    """
    path = Path(os.environ.get("NETRC") or Path("~/.netrc").expanduser())
    try:
        host, has_login = urlsplit(url).hostname, "@" in urlsplit(url).netloc
        if has_login or not path.is_file():
            return url
        login, _, password = netrc.netrc(str(path)).hosts.get(host or "", ("", "", ""))
    except (OSError, ValueError, netrc.NetrcParseError) as error:
        logger.warning("%s cannot be used (%s)", path, type(error).__name__)
        return url
    if not login and not password:
        return url
    return url.replace("://", f"://{quote(login or '', safe='')}:{quote(password or '', safe='')}@", 1)


def _strip_login(text: str) -> str:
    def shorten(match: re.Match[str]) -> str:
        scheme, login = match[1], match[2]
        user, is_http = login.partition(":")[0], scheme.lower().startswith("http")
        return scheme + (f"{user}@" if user and not is_http else "")

    return _LOGIN.sub(shorten, text)
