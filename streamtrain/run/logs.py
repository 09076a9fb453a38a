"""Logging to the terminal, with the rank on all ranks but the first."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from shards.credentials import strip_from_text
from shards.errors import printable, printable_lines
from shards.format.files import open_to_append

# the packages whose log is shown
PACKAGES = ("shards", "streamtrain")


class TerminalHandler(logging.Handler):
    """Writes INFO to stdout, and warnings and errors to stderr, above a progress bar if one is shown.

    Attributes:
        tracebacks: file for tracebacks; the terminal then shows only their last lines. None: no such file.
    """

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self._prefix = prefix
        self.tracebacks: Path | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record: ``[rank 1] warning: message``, and the exception if the record has one.

        Messages quote file names and keys, which may contain terminal codes.
        """
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        try:
            text = f"{self._prefix}{level}{printable_lines(record.getMessage())}"
            if record.exc_info is not None and (error := record.exc_info[1]) is not None:
                text += self._exception_text(text, error)
            stream = sys.stderr if level else sys.stdout
            encoding = getattr(stream, "encoding", None) or "utf-8"
            tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)
        except BrokenPipeError:
            pass  # the reader of the output has gone, such as `head`; the work continues
        except Exception:
            # a message that cannot be shown must not end the run
            self.handleError(record)

    def _exception_text(self, message: str, error: BaseException) -> str:
        """Return the exception as one line, if its traceback could be written to the file, else its traceback."""
        whole = strip_from_text("".join(traceback.format_exception(error)))
        line = printable(error) or "no message"
        summary = f": {type(error).__name__}: {line}"
        if self.tracebacks is None:
            return f"\n{printable_lines(whole).rstrip()}"
        try:
            _append_traceback(self.tracebacks, message, whole)
        except OSError:
            # the traceback of a disk error says little
            return summary if isinstance(error, OSError) else f"\n{printable_lines(whole).rstrip()}"
        return f"{summary} (traceback in {printable(self.tracebacks)})"


def _append_traceback(path: Path, message: str, whole: str) -> None:
    entry = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n{whole}\n"
    file = open_to_append(path)
    try:
        # one call, so that entries of several ranks do not interleave
        os.write(file, entry.encode("utf-8", "backslashreplace"))
    finally:
        os.close(file)


def save_traceback(error: BaseException) -> None:
    """Append the traceback of an error whose message is a whole line to the file of ``keep_tracebacks``, if any."""
    for handler in logging.getLogger(PACKAGES[0]).handlers:
        if isinstance(handler, TerminalHandler) and handler.tracebacks is not None:
            whole = strip_from_text("".join(traceback.format_exception(error)))
            with suppress(OSError):
                _append_traceback(handler.tracebacks, printable(error), whole)


def configure_logging(rank: int = 0, world_size: int = 1) -> None:
    """Show the log of this process: INFO and above on rank 0, warnings and above on the other ranks."""
    # other output may quote names that the terminal cannot show, too
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = TerminalHandler(f"[rank {rank}] " if world_size > 1 and rank > 0 else "")
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
        logger.propagate = False


def keep_tracebacks(path: Path) -> None:
    """Write the tracebacks of logged exceptions to a file; the terminal then shows one line of each."""
    for name in PACKAGES:
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, TerminalHandler):
                handler.tracebacks = path
