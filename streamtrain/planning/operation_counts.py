"""Kernels and bytes of the operations of a step, evaluated from ``operations.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

TABLE = Path(__file__).with_name("operations.json")


class Count(NamedTuple):
    """Kernels launched, and bytes of the memory-bound ones: all but matmuls and attention."""

    kernels: float
    num_bytes: float


@lru_cache
def _table() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(TABLE.read_text())
    return loaded


def multiply_sizes(product: str, sizes: Mapping[str, float]) -> float:
    """Return a product of sizes, such as ``rows*dim``."""
    return math.prod(1.0 if name == "1" else sizes[name] for name in product.split("*"))


def evaluate_entry(entry: Mapping[str, Mapping[str, float]], sizes: Mapping[str, float]) -> Count:
    """Evaluate the coefficients of a table's entry for these sizes."""
    kernels, num_bytes = (
        sum(coefficient * multiply_sizes(product, sizes) for product, coefficient in entry[kind].items())
        for kind in ("kernels", "bytes")
    )
    return Count(kernels, num_bytes)


def evaluate_counts(key: str, **sizes: float) -> Count:
    """Evaluate the entry ``key`` of ``operations.json`` for these sizes."""
    return evaluate_entry(_table()[key], sizes)
