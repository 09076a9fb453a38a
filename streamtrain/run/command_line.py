"""What every command line shares: errors of one line, paths, and the limit of open files."""

from __future__ import annotations

import argparse
import resource
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from shards.errors import ShardError, printable
from shards.storage.paths import expand_path
from shards.storage.store import is_url
from streamtrain.run.signals import EXIT_USAGE

# enough for thousands of shards; with millions, programs that close every possible descriptor take seconds
MAX_DESCRIPTORS = 65_536


class CommandParser(argparse.ArgumentParser):
    """A parser that reports an error in one line, without the usage; its subparsers do the same."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with status 2."""
        self.exit(EXIT_USAGE, f"error: {printable(message)}; see {self.prog} --help\n")


def local_path(text: str) -> Path:
    """Parse a path with ``~`` and variables, as the ``type`` of an argument."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    path = path_or_url(text)
    if is_url(path):
        raise argparse.ArgumentTypeError(f"{text} is a URL; give a local path")
    return Path(path)


def path_or_url(text: str) -> str:
    """Parse a path with ``~`` and variables, or a URL, as the ``type`` of an argument."""
    try:
        path = expand_path(text)
    except ShardError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if is_url(path) and not path.partition(":")[2].strip("/ "):
        raise argparse.ArgumentTypeError(f"the URL {text} names no folder or file")
    return path


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open files to the hard limit; child processes inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # some containers and macOS refuse it; the readers then share the smaller number
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
