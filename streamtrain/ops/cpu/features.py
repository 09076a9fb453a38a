"""The CPU features that decide which kernels can run and which number format is fast. Imports no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

# From the least to the most capable; each feature includes those before it. Second: flags of /proc/cpuinfo.
_FEATURES = (
    ("avx2", ("avx2", "fma")),
    ("avx512", ("avx512f", "avx512bw", "avx512vl", "avx512dq")),
    ("avx512_bf16", ("avx512_bf16",)),
    ("amx_bf16", ("amx_tile", "amx_bf16")),
)
# Number of features that remain under a value of the variables that limit torch and oneDNN; other values: all.
_LIMITS = {
    "ATEN_CPU_CAPABILITY": {"default": 0, "avx2": 1},
    "ONEDNN_MAX_CPU_ISA": {
        "sse41": 0, "avx": 0, "avx2": 1, "avx2_vnni": 1, "avx2_vnni_2": 1, "avx512_core": 2, "avx512_core_vnni": 2,
        "avx512_core_bf16": 3, "avx512_core_fp16": 3, "avx10_1_512": 3,
    },
}  # fmt: skip


def cpu_features() -> frozenset[str]:
    """Return which of avx2, avx512, avx512_bf16 and amx_bf16 may be used.

    The processor's own features, limited by the variables that limit torch (``ATEN_CPU_CAPABILITY``) and oneDNN
    (``ONEDNN_MAX_CPU_ISA``), so that a process can be made to behave as on an older CPU.
    """
    return limit_features(_processor_flags(), os.environ)


def limit_features(flags: Iterable[str], environment: Mapping[str, str]) -> frozenset[str]:
    """Return the features of a processor with these ``flags`` under the limits in ``environment``."""
    present, count = set(flags), 0
    while count < len(_FEATURES) and present.issuperset(_FEATURES[count][1]):
        count += 1
    for variable, limits in _LIMITS.items():
        count = min(count, limits.get(environment.get(variable, "").lower(), count))
    return frozenset(name for name, _ in _FEATURES[:count])


def kernel_feature(bf16: bool) -> str:
    """Return the feature that the kernels for bf16, or for fp32, need."""
    return "avx512_bf16" if bf16 else "avx512"


def compiler() -> str:
    """Return the C++ compiler of the kernels."""
    return os.environ.get("CXX", "c++")


def has_kernels(bf16: bool) -> bool:
    """Return whether the CPU supports the kernels for bf16, or for fp32, and there is a compiler for them."""
    return kernel_feature(bf16) in cpu_features() and shutil.which(compiler()) is not None


def multiplies_bf16() -> bool:
    """Return whether the CPU has bf16 matmul instructions; without them bf16 is slower than fp32."""
    return "avx512_bf16" in cpu_features()


@cache
def _processor_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore").splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.split()) for line in lines if line.startswith("flags")), frozenset())
