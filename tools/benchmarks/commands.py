"""Images and command lines of benchmarks that run streamtrain as users do."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

from streamtrain.errors import StreamtrainError

ROOT = Path(__file__).resolve().parents[2]


def find_class_folders(images: Path, folder: Path) -> Path:
    """Return a folder with ``train`` and ``test``, each with one subfolder per class.

    Args:
        images: such a folder, or a tar file that contains one, which is unpacked into ``folder`` at the first call.

    Raises:
        StreamtrainError: there is no such folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if images.is_file():
        unpacked = folder / "unpacked"
        if not unpacked.exists():
            with tarfile.open(images) as tar:
                tar.extractall(unpacked, filter="data")
        images = next((path.parent for path in sorted(unpacked.glob("**/train"))), unpacked)
    if not all((images / part).is_dir() for part in ("train", "test")):
        raise StreamtrainError(f"{images} has no folders train and test with one subfolder per class")
    return images


def streamtrain(*words: object) -> str:
    """Run a command of streamtrain and return its standard output.

    Raises:
        StreamtrainError: the command failed; the last line of its output is the message.
    """
    return call(sys.executable, "-m", "streamtrain.cli.main", *words)


def call(*words: object) -> str:
    """Run a command with this checkout on the Python path; as ``streamtrain``."""
    done = subprocess.run(
        [*map(str, words)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    if done.returncode:
        command = words[3] if words[1] == "-m" else Path(str(words[1])).name
        raise StreamtrainError(f"{command} failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    return done.stdout


def children_cpu_seconds() -> float:
    """Return the CPU time of all finished child processes, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
