"""Where the kernels for CPUs can be tested."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from streamtrain.kernels import build
from streamtrain.model import fused

# a compiler that is there and fails is for the tests to find
RUNS = build.able() and shutil.which(os.environ.get("CXX", "c++")) is not None
needs_kernels = pytest.mark.skipif(not RUNS, reason="this CPU has no AVX-512 for bf16, or there is no C++ compiler")


def counted(patch: Callable[[Any, str, Any], None]) -> list[str]:
    """The kernels that are called from now on; ``patch`` as ``monkeypatch.setattr`` or ``setattr``."""
    called: list[str] = []
    find = fused._kernel

    def found(kind: str, direction: str) -> Callable[..., Any]:
        called.append(f"{kind}_{direction}")
        return find(kind, direction)

    patch(fused, "_kernel", found)
    return called
