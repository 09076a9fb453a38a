"""Mutations of untrusted files, for ``fuzz.py``: some bytes, or values of a document at any depth, change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

# values that often break parsers
NUMBERS = st.sampled_from([0, -1, 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30]) | st.integers()
TEXTS = st.sampled_from(["", ".", "..", "../../etc/passwd", "/etc/passwd", "a\0b", "a\nb", "\ud800", "pipe:true"])
TEXTS |= st.text(max_size=20)
SCALARS = st.none() | st.booleans() | NUMBERS | st.floats() | TEXTS
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


def mutate_bytes(draw: Callable[..., Any], content: bytes) -> bytes:
    """Overwrite, remove, insert, duplicate or truncate some bytes."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        length = draw(st.integers(0, 64))
        kind = draw(st.sampled_from(["set", "cut", "put", "double", "end"]))
        if kind == "set":
            new = draw(st.binary(min_size=1, max_size=8))
            changed[at : at + len(new)] = new
        elif kind == "cut":
            del changed[at : at + length]
        elif kind == "put":
            changed[at:at] = draw(st.binary(max_size=32))
        elif kind == "double":
            changed[at:at] = changed[at : at + length] * draw(st.integers(1, 40))
        else:
            del changed[at:]
    return bytes(changed)


def mutate_document(draw: Callable[..., Any], document: Any) -> Any:
    """Return a copy with some values, at any depth, replaced, removed, added or nested."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(0, 3))):
        node: Any = document
        while isinstance(node, dict | list) and node:
            key = draw(st.sampled_from(sorted(node, key=str) if isinstance(node, dict) else range(len(node))))
            if not isinstance(node[key], dict | list) or draw(st.integers(0, 3)) == 0:
                kind = draw(st.sampled_from(["replace", "remove", "add", "nest"]))
                if kind == "remove":
                    del node[key]
                elif kind == "add" and isinstance(node, dict):
                    node[draw(TEXTS)] = draw(JSON)
                elif kind == "nest":
                    for _ in range(draw(st.integers(1, 50))):
                        node[key] = [node[key]]
                else:
                    node[key] = draw(JSON)
                break
            node = node[key]
    return document
