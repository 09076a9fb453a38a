"""Remove credentials from URLs in messages and files, and add HTTP logins from ``~/.netrc``.

The user, the password and the query of a URL can be secret: ``https://user:password@host/set``,
``https://host/set?X-Amz-Signature=...``.
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

    The user name remains, because it may name an account (``abfs://container@account``). Over HTTP it is removed,
    because it may be a token.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    return _strip_login(f"{scheme}://{re.split('[?#]', rest, maxsplit=1)[0]}")


def strip_from_text(text: str) -> str:
    """Return a text with the credentials of all URLs in it removed; queries are replaced by ``?...``."""
    return _strip_login(_QUERY.sub(r"\1?...", text)) if "://" in text else text


def strip_values(value: Any) -> Any:
    """Return nested settings with the credentials removed from every URL."""
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

    A URL with a user of its own is returned unchanged. The entry ``default`` is not used, because an untrusted
    shard set may name any host.
    """
    path = Path(os.environ.get("NETRC") or Path("~/.netrc").expanduser())
    try:
        host, has_login = urlsplit(url).hostname, "@" in urlsplit(url).netloc
        if has_login or not path.is_file():
            return url
        login, _, password = netrc.netrc(str(path)).hosts.get(host or "", ("", "", ""))
    except (OSError, ValueError, netrc.NetrcParseError) as error:
        logger.warning("%s is ignored, because it cannot be read (%s)", path, type(error).__name__)
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
