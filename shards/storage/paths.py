"""Paths as users write them: with ``~`` and environment variables."""

from __future__ import annotations

import os
import re

from shards.errors import ShardError
from shards.storage.store import is_url

# as in a shell; any other dollar sign is part of the file name
_VARIABLE = re.compile(r"\$(?:\{([^{}]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
_MAX_ROUNDS = 16
_MAX_LENGTH = 1 << 16


def expand_path(text: str) -> str:
    """Return a path with ``~``, ``~user``, ``$VARIABLE`` and ``${VARIABLE}`` replaced; a URL is unchanged.

    Variables inside the value of a variable are replaced as well, so an expanded path stays the same when it is
    expanded again. The path of an existing file with a ``$`` or ``~`` in its name is returned unchanged.

    Raises:
        ShardError: a variable is not set, there is no such user, or ``~`` is a folder within the path.
    """
    path = text
    for _ in range(_MAX_ROUNDS):
        if is_url(path):
            return path
        expanded = _VARIABLE.sub(_value, path)
        if expanded == path:
            # an existing file may be named like a variable that is not set; a variable may hold itself
            if any((match[1] or match[2]) in os.environ for match in _VARIABLE.finditer(path)):
                break
            expanded = _expand_home(path)
            if expanded == path:
                return path
        path = expanded
        if len(path) > _MAX_LENGTH:
            break
    raise ShardError(f"the path {text} cannot be expanded: its variables refer to each other; set them to plain paths")


def _value(match: re.Match[str]) -> str:
    path = match.string
    name = match[1] if match[1] is not None else match[2]
    value = os.environ.get(name) if name and "\0" not in name else None
    if value is None:
        if os.path.lexists(path):
            return match[0]
        raise ShardError(f"the path {path} needs the environment variable {name}, which is not set; set it")
    return value


def _expand_home(path: str) -> str:
    first, *others = path.split("/")
    if first.startswith("~"):
        expanded = os.path.expanduser(path)
        if expanded == path and (first == "~" or not os.path.lexists(path)):
            reason = f"there is no user {first[1:]}" if first != "~" else "the home folder is not known; set HOME"
            raise ShardError(f"the path {path} starts with {first}, but {reason}")
        return expanded
    if "~" in others and not os.path.lexists(path):
        raise ShardError(f"the path {path} contains a folder called ~; write ~ only at the start of a path")
    return path
