"""What a tool says of an output it cannot write, the same in all tools."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streamtrain.errors import StreamtrainError


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """The ``with`` block writes to ``out``.

    Raises:
        StreamtrainError: if it cannot; one line that names it.
    """
    try:
        yield
    except OSError as error:
        raise StreamtrainError(f"cannot write {out} ({error.strerror or error}); choose another --out") from None
