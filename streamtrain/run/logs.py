"""Messages on the terminal, for a person, and in the run directory, where those of libraries are too."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from shards.credentials import strip_from_text
from shards.errors import printable, printable_lines
from shards.format.files import open_to_append

# the packages whose log is shown
PACKAGES = ("shards", "streamtrain")
# Settings of libraries that leave out messages below an error and the bars of Hugging Face, which tear ours. A
# variable that the user has set is kept.
_QUIET = {
    "TORCH_CPP_LOG_LEVEL": "ERROR", "TORCH_LOGS": "-all",
    "TRANSFORMERS_VERBOSITY": "error", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}  # fmt: skip
# with this variable of Python, libraries write their messages to the terminal as usual
SHOW_VARIABLE = "PYTHONWARNINGS"
# messages that are remembered to show each of them once
_MAX_REMEMBERED = 10_000


class _Repeated:
    """Recognises messages that have been shown before."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def has(self, text: str) -> bool:
        """Return whether ``text`` was passed before, and remember it."""
        key = hash(text)
        if key in self._seen:
            return True
        if len(self._seen) < _MAX_REMEMBERED:
            self._seen.add(key)
        return False


class TerminalHandler(logging.Handler):
    """Writes INFO to stdout, and warnings and errors to stderr, above a progress bar if one is shown.

    The same warning is shown once.

    Attributes:
        tracebacks: file for tracebacks; the terminal then shows only their last lines. None: no such file.
    """

    def __init__(self, prefix: str = "") -> None:
        super().__init__(logging.INFO)
        self._prefix = prefix
        self._warnings = _Repeated()
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
            if record.levelno == logging.WARNING and self._warnings.has(text):
                return
            _write(text, sys.stderr if level else sys.stdout)
        except BrokenPipeError:
            pass  # the reader of the output has gone, such as `head`; the work continues
        except Exception:
            # a message that cannot be shown must not end the run
            self.handleError(record)

    def _exception_text(self, message: str, error: BaseException) -> str:
        """Return the exception as one line, if its traceback could be written to the file, else its traceback."""
        whole = f"{_whole_traceback(error)}\n"
        line = printable(error) or "no message"
        summary = f": {type(error).__name__}: {line}"
        if self.tracebacks is None:
            return f"\n{printable_lines(whole).rstrip()}"
        try:
            _append(self.tracebacks, f"{_now()} {message}\n{whole}\n")
        except OSError:
            # the traceback of a disk error says little
            return summary if isinstance(error, OSError) else f"\n{printable_lines(whole).rstrip()}"
        return f"{summary} (traceback in {printable(self.tracebacks)})"


class LibraryHandler(logging.Handler):
    """Shows errors that libraries log; the rest of their messages is only in the file of ``keep_messages``."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.prefix = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record above a progress bar: ``[rank 1] error: message (DeepSpeed)``."""
        with suppress(Exception):
            message = printable_lines(strip_from_text(record.getMessage()))
            text = f"{self.prefix}error: {message} ({printable(record.name)})"
            if record.exc_info is not None and (error := record.exc_info[1]) is not None:
                text += f"\n{printable_lines(_whole_traceback(error))}"
            _write(text, sys.stderr)


class FileHandler(logging.Handler):
    """Appends messages to a file, with the time, the rank and the library; the same message of a library only once.

    It keeps the file open, so that nothing is written to another directory that takes the place of the run's.
    """

    def __init__(self, path: Path, prefix: str) -> None:
        """Open the file; raises OSError."""
        super().__init__()
        self._prefix = prefix
        self._repeated = _Repeated()
        self._file = os.fdopen(open_to_append(path), "ab", buffering=0)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; a full or failing disk leaves it out."""
        with suppress(Exception):
            level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
            is_own = record.name.partition(".")[0] in PACKAGES
            library = "" if is_own else f" ({printable(record.name)})"
            message = printable_lines(strip_from_text(record.getMessage())).rstrip()
            text = f"{self._prefix}{level}{message}{library}\n"
            if record.exc_info is not None and (error := record.exc_info[1]) is not None and not is_own:
                text += f"{_whole_traceback(error)}\n"
            # libraries repeat some warnings in every step
            if is_own or not self._repeated.has(text):
                # one call, so that lines of several ranks do not interleave
                self._file.write(f"{_now()} {text}".encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()
        super().close()


def configure_logging(rank: int = 0, world_size: int = 1) -> None:
    """Show the log of this process: INFO and above on rank 0, warnings and above on the other ranks."""
    # other output may quote names that the terminal cannot show, too
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = TerminalHandler(_prefix(rank, world_size))
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
        logger.propagate = False
    if (library_handler := _library_handler()) is not None:
        library_handler.prefix = _prefix(rank, world_size)


def hide_library_messages() -> None:
    """Keep messages of libraries below an error off the terminal, unless ``PYTHONWARNINGS`` is set.

    For a process that belongs to the command, before the imports of libraries.
    """
    shown = os.environ.get(SHOW_VARIABLE, "").split(",")
    if any(part and not part.startswith("ignore") for part in shown):
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.captureWarnings(True)
    logging.getLogger().handlers = [LibraryHandler()]


def take_over(logger: logging.Logger) -> None:
    """Let the handlers of the root logger receive the messages of a library that has its own handler."""
    if _library_handler() is not None:
        logger.handlers, logger.propagate = [], True


@contextmanager
def log_printed_lines(start: str, name: str) -> Iterator[None]:
    """Turn stdout lines that begin with ``start`` into warnings of logger ``name``."""
    if _library_handler() is None:
        yield
        return
    stream = _LineFilter(sys.stdout, start, logging.getLogger(name))
    try:
        with redirect_stdout(stream):
            yield
    finally:
        stream.write_rest()


class _LineFilter(io.TextIOBase):
    """A stream that logs some lines and passes the others to another stream."""

    def __init__(self, stream: TextIO, start: str, logger: logging.Logger) -> None:
        self._stream, self._start, self._logger, self._line = stream, start, logger, ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if line.startswith(self._start):
                self._logger.warning("%s", line.removeprefix(self._start).strip())
            else:
                self._stream.write(f"{line}\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def write_rest(self) -> None:
        """Write the text after the last line."""
        self._stream.write(self._line)


def keep_messages(path: Path, rank: int, world_size: int) -> None:
    """Write all messages from now on to a file too, also those of libraries that the terminal does not show."""
    try:
        handler = FileHandler(path, _prefix(rank, world_size))
    except OSError:
        return  # a full or failing disk; the run reports that where it matters
    for name in (*PACKAGES, *([""] if _library_handler() is not None else [])):
        logging.getLogger(name).addHandler(handler)


def close_bars() -> None:
    """Leave the progress bars as they are, with the cursor on a new line."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def keep_tracebacks(path: Path) -> None:
    """Write the tracebacks of logged exceptions to a file; the terminal then shows one line of each."""
    for name in PACKAGES:
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, TerminalHandler):
                handler.tracebacks = path


def save_traceback(error: BaseException) -> None:
    """Append the traceback of an error whose message is a whole line to the file of ``keep_tracebacks``, if any."""
    for handler in logging.getLogger(PACKAGES[0]).handlers:
        if isinstance(handler, TerminalHandler) and handler.tracebacks is not None:
            with suppress(OSError):
                _append(handler.tracebacks, f"{_now()} {printable(error)}\n{_whole_traceback(error)}\n")


def _write(text: str, stream: TextIO) -> None:
    """Write lines above a progress bar if one is shown; characters that the stream cannot encode are escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    # clears the ^C that a terminal shows after the bar
    clear = "\033[K" if getattr(tqdm, "_instances", ()) and stream.isatty() else ""
    tqdm.write(clear + text.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def _library_handler() -> LibraryHandler | None:
    return next((handler for handler in logging.getLogger().handlers if isinstance(handler, LibraryHandler)), None)


def _prefix(rank: int, world_size: int) -> str:
    return f"[rank {rank}] " if world_size > 1 and rank > 0 else ""


def _whole_traceback(error: BaseException) -> str:
    return strip_from_text("".join(traceback.format_exception(error))).rstrip()


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _append(path: Path, text: str) -> None:
    """Append text to a file, in one call, so that entries of several ranks do not interleave; raises OSError."""
    descriptor = open_to_append(path)
    try:
        os.write(descriptor, text.encode("utf-8", "backslashreplace"))
    finally:
        os.close(descriptor)
