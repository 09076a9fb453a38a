"""What a run is made by: the program's own code, the libraries, and the machine; kept as ``environment.json``.

Free of torch, as it is looked at before a run starts.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ENVIRONMENT_NAME = "environment.json"
_LIBRARIES = ("torch", "deepspeed", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "torchao")
_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("shards", "streamtrain")
_SOURCES = (".py", ".cpp", ".h")


def program() -> dict[str, str]:
    """What results may depend on beside the configuration: by name, a version each."""
    found = {"code": _code_digest(), "python": ".".join(platform.python_version_tuple()[:2])}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # one that is optional, or the other DALI
    return found


def environment(world_size: int) -> dict[str, Any]:
    """The document."""
    return {
        "program": program(),
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "world_size": world_size,
    }


def _code_digest() -> str:
    """Of all source files, committed or not; 12 hexadecimal digits."""
    total = hashlib.sha256()
    files = (path for package in _PACKAGES for path in (_ROOT / package).rglob("*") if path.suffix in _SOURCES)
    for path in sorted(files):
        content = path.read_bytes()
        total.update(f"{path.relative_to(_ROOT)} {len(content)}\n".encode() + content)
    return total.hexdigest()[:12]


def _commit() -> str | None:
    """That of the checkout, for people; what is not committed shows in the digest alone."""
    words = ["git", "-C", str(_ROOT), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
