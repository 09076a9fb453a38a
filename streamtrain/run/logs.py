"""Logging to the terminal, with the rank on all ranks but the first."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm

from shards.credentials import strip_from_text

# the packages whose log is shown
PACKAGES = ("shards", "streamtrain")


class TerminalHandler(logging.Handler):
    """Writes INFO to stdout, and warnings and errors to stderr, above a progress bar if one is shown."""

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self._prefix = prefix

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record: ``[rank 1] warning: message``, followed by the traceback if the record has one."""
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        text = f"{self._prefix}{level}{strip_from_text(self.format(record))}"
        try:
            tqdm.write(text, file=sys.stderr if level else sys.stdout)
        except BrokenPipeError:
            pass  # the reader of the output has gone, such as `head`; the work continues
        except (OSError, ValueError):
            self.handleError(record)


def configure_logging(rank: int = 0, world_size: int = 1) -> None:
    """Show the log of this process: INFO and above on rank 0, warnings and above on the other ranks."""
    handler = TerminalHandler(f"[rank {rank}] " if world_size > 1 and rank > 0 else "")
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
        logger.propagate = False
