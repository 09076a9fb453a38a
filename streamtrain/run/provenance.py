"""Versions of code and libraries, and the machine of a run (``environment.json``). Torch-free."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ENVIRONMENT_NAME = "environment.json"
# key of the planned peak of a rank's memory, which depends on the machine
PLANNED_PEAK = "planned_peak_bytes"
_LIBRARIES = ("torch", "deepspeed", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "torchao")
_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("shards", "streamtrain")
_SOURCES = (".py", ".cpp", ".h")


def program_versions() -> dict[str, str]:
    """Return the versions of Python, the libraries and streamtrain's own code (a digest), by name."""
    versions = {"code": _code_digest(), "python": ".".join(platform.python_version_tuple()[:2])}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # an optional library, or DALI for the other CUDA version
    return versions


def describe_environment(world_size: int) -> dict[str, Any]:
    """Return the content of ``environment.json``, without device and data type."""
    return {
        "program": program_versions(),
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "world_size": world_size,
    }


def _processor_name() -> str:
    """Return the model of the CPU, or the empty string if the system does not name it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = (line.partition(":") for line in file)
            return next((value.strip() for key, _, value in lines if key.strip() == "model name"), "")
    except OSError:
        return platform.processor()


def _code_digest() -> str:
    """Return 12 hexadecimal digits of the SHA-256 of all source files, committed or not."""
    digest = hashlib.sha256()
    files = (path for package in _PACKAGES for path in (_ROOT / package).rglob("*") if path.suffix in _SOURCES)
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(_ROOT)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def _commit() -> str | None:
    """Return the checkout's commit, or None without one; uncommitted changes show only in the code digest."""
    command = ["git", "-C", str(_ROOT), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
