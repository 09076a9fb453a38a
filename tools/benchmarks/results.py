"""Result files of benchmarks: the numbers with the command, commit, versions and hardware that produced them."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "deepspeed", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "torchao", "webdataset")
# CPU features that decide which kernels run
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")


def median_result(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the median over the runs of each number, and the first run's value of everything else."""
    return {key: _median([run[key] for run in runs]) for key in runs[0]}


def save_result(path: Path, benchmark: str, arguments: Sequence[str], runs: Sequence[dict[str, Any]]) -> None:
    """Write the result of one or more runs as JSON.

    The file has ``result`` (medians, flat, keys as printed), ``spread`` (minimum and maximum of each number over
    the repeats), ``repeats``, ``benchmark``, ``command``, ``date``, ``commit``, ``versions`` and ``hardware``.
    """
    document = {
        "benchmark": benchmark,
        "command": f"python tools/bench.py {shlex.join(_without_save(arguments))}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **_describe_commit(),
        "versions": _library_versions(),
        "hardware": _describe_hardware(),
        "repeats": len(runs),
        "result": median_result(runs),
        "spread": {key: _spread([run[key] for run in runs]) for key, value in runs[0].items() if _is_number(value)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _median(values: list[Any]) -> Any:
    if not _is_number(values[0]):
        return values[0]
    median = statistics.median(values)
    return round(median) if all(isinstance(value, int) for value in values) else median


def _spread(values: list[Any]) -> list[Any]:
    return [min(values), max(values)]


def _without_save(arguments: Sequence[str]) -> list[str]:
    kept = [argument for argument in arguments if not argument.startswith("--save=")]
    if "--save" in kept:
        at = kept.index("--save")
        del kept[at : at + 2]
    return kept


def _describe_commit() -> dict[str, Any]:
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "has_uncommitted_changes": None if changes is None else bool(changes)}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _library_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # optional, or the other DALI build
    return versions


def _describe_hardware() -> dict[str, Any]:
    import torch

    cpu = _read_cpuinfo()
    flags = set(cpu.get("flags", "").split())
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cpu_features": [feature for feature in CPU_FEATURES if feature in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
        "load_average": os.getloadavg()[0],
    }


def _read_cpuinfo() -> dict[str, str]:
    """Return the fields of the first processor (Linux; empty elsewhere)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = text.partition("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
