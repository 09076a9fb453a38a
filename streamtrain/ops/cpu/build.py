"""The CPU kernels: compiled on first use, then kept in the user's cache.

They need AVX-512 and compute in fp32 or, with AVX512_BF16, in bf16 (fast with AMX). Without these instructions or a
compiler, the PyTorch implementations run instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from shards.errors import ShardError
from shards.progress import bar_size
from shards.storage.paths import expand_path
from streamtrain.ops.cpu.features import compiler, cpu_features, kernel_feature
from streamtrain.ops.cpu.private_folder import NotPrivateError, open_or_make, open_private

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_REDRAW_SECONDS = 1.0
# below the folder of compiled extensions
_NAME = "streamtrain"
# the same on every machine, so that a cache in a shared home serves them all
_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-mfma",
          "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"]  # fmt: skip


def is_supported(dtype: torch.dtype) -> bool:
    """Return whether there are kernels for ``dtype`` and this CPU has the instructions they use."""
    return dtype in (torch.float32, torch.bfloat16) and kernel_feature(dtype == torch.bfloat16) in cpu_features()


class _Selection:
    """State of this process, like torch's number of threads; the ranks of a run agree on it."""

    enabled = True


def set_enabled(enabled: bool) -> None:
    """Use the kernels from now on, where they are supported, or do not use them."""
    _Selection.enabled = enabled


def is_enabled(dtype: torch.dtype) -> bool:
    """Return whether the kernels for ``dtype`` are selected and loaded into ``torch.ops.streamtrain``."""
    return _Selection.enabled and load(dtype)


@cache
def load(dtype: torch.dtype) -> bool:
    """Load the kernels for ``dtype`` into ``torch.ops.streamtrain``, compiling them if necessary (half a minute).

    Returns whether they can be used; if the CPU supports them but they cannot be compiled or loaded, a warning is
    logged.
    """
    if not is_supported(dtype):
        return False
    try:
        _load_library()
        # one matmul, since oneDNN may lack support for it
        one = torch.zeros(1, 32, dtype=dtype)
        torch.ops.streamtrain.logits(one, one, 1.0, None, torch.empty(1, 1))
    except (OSError, RuntimeError, ShardError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = [line for line in lines if "error" in line or "cannot find" in line] or lines[-1:]
        logger.warning(
            "the CPU kernels cannot be used, so steps take at least twice as long; they need g++ and a writable "
            "folder (TORCH_EXTENSIONS_DIR): %s",
            reason[0] if reason else type(error).__name__,
        )
        return False
    return True


def library_name() -> str:
    """Return the file name of the library of exactly these sources, flags and torch version."""
    parts = [compiler(), *_FLAGS, torch.__version__, *(path.read_text() for path in sorted(_FOLDER.glob("*.[ch]*")))]
    return f"kernels-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"


@cache
def _load_library() -> None:
    """Load the library, and compile it first if it is missing. The other ranks of this machine wait for the first."""
    with _open_cache() as folder:
        descriptor = open_or_make(folder, library_name(), _compile)
        try:
            # the file that was checked, even if another one has its name by now
            ctypes.CDLL(f"/proc/self/fd/{descriptor}")
        except OSError as error:
            raise OSError(f"the compiled library cannot be loaded ({error})") from None
        finally:
            os.close(descriptor)


@contextmanager
def _open_cache() -> Iterator[int]:
    """Open the folder of compiled libraries, or the one in the user's own cache if others may write to the first.

    Users of a cluster often share ``TORCH_EXTENSIONS_DIR``, where any of them could plant a library.
    """
    # the folders torch.utils.cpp_extension would choose; asking it would print that a CPU machine has no GPU
    own = Path(expand_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "torch_extensions"
    chosen = Path(expand_path(os.environ.get("TORCH_EXTENSIONS_DIR") or str(own)))
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(open_private(chosen / _NAME))
        except NotPrivateError as error:
            if chosen == own:
                raise
            logger.warning("%s; the CPU kernels are stored in %s instead", error, own / _NAME)
            folder = stack.enter_context(open_private(own / _NAME))
        yield folder


def _compile(library: Path) -> None:
    logger.info("compiling the CPU kernels: once per machine, usually half a minute")
    sources = sorted(_FOLDER.glob("*.cpp"))
    installed = Path(torch.__file__).parent
    objects = [library.with_name(f"{source.stem}.o") for source in sources]

    def run(*arguments: str | Path) -> None:
        subprocess.run([compiler(), *_FLAGS, *arguments], check=True, capture_output=True, text=True)

    def compile_one(source: Path, to: Path) -> None:
        run(f"-I{installed / 'include'}", "-c", source, "-o", to)

    # one process per source; each takes most of a gigabyte
    with (
        tqdm(total=len(sources), desc="compiling", unit="file", leave=False, disable=None, **bar_size()) as bar,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
    ):
        pending = {pool.submit(compile_one, *each) for each in zip(sources, objects, strict=True)}
        while pending:
            done, pending = wait(pending, timeout=_REDRAW_SECONDS)
            for compiled in done:
                compiled.result()
            bar.update(len(done))
            # shows that time passes
            bar.refresh()
    run("-shared", *objects, "-o", library, f"-L{installed / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch")
