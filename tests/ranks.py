"""Start a script on several ranks of this machine, like a launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from fork_server import ForkedProcess, start_forked

RankProcess: TypeAlias = ForkedProcess | subprocess.Popen[str]

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """Return an unused port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(
    command: Sequence[str | Path], world_size: int, packages: Path | None = None, fresh: bool = False
) -> list[RankProcess]:
    """Start ``python command`` on each rank; the caller must wait for the processes or kill them.

    ``packages``: a directory of packages that precede the installed ones. ``fresh``: with new processes that import
    everything themselves, instead of forks, which start faster.
    """
    path = os.pathsep.join(str(folder) for folder in (packages, ROOT) if folder)
    shared = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}
    environments = [{**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    if not fresh and packages is None:
        return [start_forked(command, environment) for environment in environments]
    words = [sys.executable, *map(str, command)]
    return [
        subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for environment in environments
    ]


def run_ranks(
    command: Sequence[str | Path], world_size: int, timeout: float = 300, packages: Path | None = None,
    fresh: bool = False,
) -> list[tuple[int, str, str]]:  # fmt: skip
    """Run ``python command`` on all ranks to its end; returns exit status, stdout and stderr of each."""
    processes = start_ranks(command, world_size, packages, fresh)
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, out, err) for process, (out, err) in zip(processes, outputs, strict=True)]
