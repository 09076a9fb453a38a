"""Run the ``streamtrain`` command in a process, as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ranks import ROOT

from streamtrain.cli.main import main

COMMAND = [sys.executable, "-m", "streamtrain.cli.main"]
# a test that runs below a launcher must not look like a rank
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
ENVIRONMENT["PYTHONPATH"] = str(ROOT)


def run_command(*arguments: object, cwd: Path = ROOT, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run ``streamtrain ARGUMENTS`` to its end."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=timeout)


@contextmanager
def started(*arguments: str, stderr: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    """Start ``streamtrain ARGUMENTS``, and kill it at the end."""
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=stderr
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def exit_status(arguments: Sequence[object]) -> int:
    """Run ``streamtrain ARGUMENTS`` in this process, which is faster, and return its exit status."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
