"""The lock of the run directory, and whether the directory at its path is still the locked one. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from shards.format.folder_lock import FolderInUse, lock_folder
from streamtrain.errors import StreamtrainError
from streamtrain.run.signals import STOP_NAME

LOCK_NAME = ".streamtrain.lock"
# stop request of a run whose directory has moved; higher than every exit code, so that all ranks see this one
MOVED = 255


@contextmanager
def run_lock(run_dir: Path, rank: int) -> Iterator[Callable[[], bool]]:
    """Lock the run directory during the ``with`` block; rank 0 holds the lock for all ranks.

    Yields a function that returns whether the directory was moved, replaced or deleted since; always False on the
    other ranks. The system releases the lock when the process ends, even if it is killed.

    Raises:
        StreamtrainError: another run holds the lock, or the directory cannot be opened.
    """
    if rank > 0:
        yield lambda: False
        return
    with ExitStack() as stack:
        try:
            descriptor = stack.enter_context(lock_folder(run_dir, LOCK_NAME))
        except FolderInUse:
            raise StreamtrainError(
                f"another run is writing to {run_dir}; wait until it ends, stop it with `touch {run_dir / STOP_NAME}`, "
                "or set run.dir to another directory"
            ) from None
        except OSError as error:
            raise StreamtrainError(
                f"the run directory {run_dir} cannot be locked ({error.strerror}: {error.filename}); make it writable, "
                "or set run.dir to another directory"
            ) from None
        yield lambda: _has_moved(run_dir, descriptor)


def moved_error(run_dir: Path) -> StreamtrainError:
    """Return the error of a run whose directory is no longer at its path."""
    return StreamtrainError(
        f"run.dir {run_dir} was moved, replaced or deleted while this run was writing to it; the run stops and "
        "writes nothing more; to resume, move the directory back, or set run.dir to its new path"
    )


def _has_moved(run_dir: Path, descriptor: int) -> bool:
    """Return whether the path leads to another directory than ``descriptor``, which keeps the inode in use."""
    try:
        return not os.path.samestat(os.stat(run_dir), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False  # unknown while the disk or network fails; the next write reports that
