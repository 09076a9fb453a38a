"""Helpers for tests of the CPU kernels: the dtypes that can be tested here, and a record of the calls."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from streamtrain.ops.cpu import branches, build

# A compiler that exists but fails must fail the tests.
_COMPILER = shutil.which(os.environ.get("CXX", "c++")) is not None
_ALL = (torch.bfloat16, torch.float32)
# the first is the default of a run
DTYPES = [dtype for dtype in _ALL if _COMPILER and build.is_supported(dtype)]
REASON = "this CPU lacks the instructions of the kernels for this dtype, or there is no C++ compiler"
needs_kernels = pytest.mark.skipif(not DTYPES, reason=REASON)
for_each_dtype = pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=pytest.mark.skipif(dtype not in DTYPES, reason=REASON)) for dtype in _ALL]
)


def record_kernel_calls(patch: Callable[[Any, str, Any], None]) -> list[str]:
    """Return a list to which each kernel call is appended; ``patch`` is ``monkeypatch.setattr`` or ``setattr``."""
    called: list[str] = []
    original = branches._kernel

    def kernel(kind: str, direction: str) -> Callable[..., Any]:
        called.append(f"{kind}_{direction}")
        return original(kind, direction)

    patch(branches, "_kernel", kernel)
    return called
