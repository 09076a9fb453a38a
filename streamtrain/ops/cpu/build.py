"""The kernels for CPUs: compiled when first needed, then kept in the user's cache.

They are for CPUs with AVX-512, and compute in fp32 or, where it has instructions for that, in bf16, which is fast where
there is a matrix unit beside them (AMX). Elsewhere, and where no compiler is at hand, torch's own operations do the
same work.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

_FOLDER = Path(__file__).parent
_WANTED = ("f", "bw", "vl", "dq")
_FOR_BF16 = (*_WANTED, "bf16")
# the same on every machine, so that a cache in a shared home serves them all
_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-mfma", *(f"-mavx512{part}" for part in _FOR_BF16)]


def able(dtype: torch.dtype) -> bool:
    """Whether there are kernels that compute in such numbers, and this CPU has the instructions they are made of."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    has, wanted = torch.cpu.get_capabilities(), _FOR_BF16 if dtype == torch.bfloat16 else _WANTED
    return all(has.get(f"avx512_{part}", False) for part in wanted)


class _Choice:
    """Of this process, as torch's number of threads is: the ranks of a run have to agree on it."""

    wanted = True


def use(wanted: bool) -> None:
    """Whether kernels are to be used from now on, where they can be."""
    _Choice.wanted = wanted


def usable(dtype: torch.dtype) -> bool:
    """Whether kernels are wanted, and ``torch.ops.streamtrain`` has those for such numbers."""
    return _Choice.wanted and found(dtype)


@cache
def found(dtype: torch.dtype) -> bool:
    """Whether ``torch.ops.streamtrain`` has kernels for such numbers; compiles them (half a minute) if need be."""
    if not able(dtype):
        return False
    try:
        torch.ops.load_library(_library())
        # one product, which oneDNN may be without, or have been told to do without (ONEDNN_MAX_CPU_ISA)
        one = torch.zeros(1, 32, dtype=dtype)
        torch.ops.streamtrain.logits(one, one, 1.0, None, torch.empty(1, 1))
    # a home that nobody knows of, and a file system without locks, are RuntimeErrors
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = [line for line in lines if "error" in line or "cannot find" in line] or lines[-1:]
        warnings.warn(
            "the CPU kernels cannot be used, so that steps take twice as long, or longer; they need g++ and a "
            f"folder to write to (TORCH_EXTENSIONS_DIR): {reason[0] if reason else type(error).__name__}",
            stacklevel=2,
        )
        return False
    return True


def _library() -> Path:
    """The compiled library of just these sources and this torch."""
    sources = sorted(_FOLDER.glob("*.cpp"))
    compiler = os.environ.get("CXX", "c++")
    parts = [compiler, *_FLAGS, torch.__version__, *(path.read_text() for path in sorted(_FOLDER.glob("*.[ch]*")))]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    # where torch's own would lie; to ask torch would, on a CPU, print that there is no GPU
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or caches / "torch_extensions") / "streamtrain"
    library = folder / f"kernels-{digest}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    # a lock that ends with its process; the other ranks of this machine wait for the first one
    with FileLock(folder / f"kernels-{digest}.lock"):
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                print("compiling the kernels for CPUs: once, half a minute", file=sys.stderr, flush=True)
                made = Path(temporary) / library.name
                _compile(compiler, sources, made)
                os.replace(made, library)
    return library


def _compile(compiler: str, sources: list[Path], library: Path) -> None:
    installed = Path(torch.__file__).parent
    objects = [library.with_name(f"{source.stem}.o") for source in sources]

    def run(*arguments: str | Path) -> None:
        subprocess.run([compiler, *_FLAGS, *arguments], check=True, capture_output=True, text=True)

    def compile_one(source: Path, to: Path) -> None:
        run(f"-I{installed / 'include'}", "-c", source, "-o", to)

    # each in a process of its own, which takes most of a gigabyte
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    run("-shared", *objects, "-o", library, f"-L{installed / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch")
