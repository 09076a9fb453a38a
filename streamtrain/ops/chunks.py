"""Sizes of chunks of prototypes, without torch."""

from __future__ import annotations

from collections.abc import Iterator


def chunk_rows(chunk_bytes: int, num_rows: int, num_prototypes: int) -> int:
    """Return the prototypes per chunk, so that the fp32 logits of ``num_rows`` take at most ``chunk_bytes``.

    It is a multiple of 64 (for the matrix units), and at least 64.
    """
    fitting = chunk_bytes // (4 * max(1, num_rows))
    return min(num_prototypes, max(64, fitting // 64 * 64))


def chunks(num_prototypes: int, chunk: int) -> Iterator[slice]:
    """Yield consecutive slices of at most ``chunk`` prototypes."""
    for start in range(0, num_prototypes, chunk):
        yield slice(start, min(start + chunk, num_prototypes))
