"""Where the kernels for CPUs can be tested, and in which numbers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from streamtrain.model import fused
from streamtrain.ops.cpu import build

# a compiler that is there and fails is for the tests to find
_COMPILER = shutil.which(os.environ.get("CXX", "c++")) is not None
_ALL = (torch.bfloat16, torch.float32)
# the first of them is what a run computes in unless it says otherwise
NUMBERS = [dtype for dtype in _ALL if _COMPILER and build.able(dtype)]
REASON = "this CPU has no instructions for kernels in such numbers, or there is no C++ compiler"
needs_kernels = pytest.mark.skipif(not NUMBERS, reason=REASON)
in_each_number = pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=pytest.mark.skipif(dtype not in NUMBERS, reason=REASON)) for dtype in _ALL]
)


def counted(patch: Callable[[Any, str, Any], None]) -> list[str]:
    """The kernels that are called from now on; ``patch`` as ``monkeypatch.setattr`` or ``setattr``."""
    called: list[str] = []
    find = fused._kernel

    def found(kind: str, direction: str) -> Callable[..., Any]:
        called.append(f"{kind}_{direction}")
        return find(kind, direction)

    patch(fused, "_kernel", found)
    return called
