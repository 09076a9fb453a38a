"""CPU features: read from the processor's flags, then limited by the variables that limit torch and oneDNN."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from ranks import ROOT

from streamtrain.ops.cpu.features import cpu_features, limit_features

AVX2 = ["avx2", "fma"]
AVX512 = [*AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq"]
AMX = [*AVX512, "avx512_bf16", "amx_tile", "amx_bf16"]
ALL = ["avx2", "avx512", "avx512_bf16", "amx_bf16"]


@pytest.mark.parametrize(
    ("flags", "count"),
    [([], 0), (["avx512f"], 0), (["avx2"], 0), (AVX2, 1), ([*AVX2, "avx512f"], 1), (AVX512, 2),
     ([*AVX512, "avx512_bf16"], 3), (AMX, 4)],
)  # fmt: skip
def test_features_of_a_processor(flags: list[str], count: int) -> None:
    assert limit_features(flags, {}) == set(ALL[:count])


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({"ATEN_CPU_CAPABILITY": "default"}, 0),
        ({"ATEN_CPU_CAPABILITY": "avx2"}, 1),
        ({"ATEN_CPU_CAPABILITY": "avx512"}, 4),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, 1),
        ({"ONEDNN_MAX_CPU_ISA": "avx512_core"}, 2),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, 3),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, 4),
        ({"ONEDNN_MAX_CPU_ISA": "ALL"}, 4),
        ({"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, 1),
    ],
)
def test_variables_limit_the_features(environment: dict[str, str], count: int) -> None:
    assert limit_features(AMX, environment) == set(ALL[:count])
    # a limit adds nothing
    assert limit_features(AVX2, environment) == set(ALL[: min(count, 1)])


@pytest.mark.parametrize("limit", [{}, {"ATEN_CPU_CAPABILITY": "avx2"}, {"ATEN_CPU_CAPABILITY": "default"}])
def test_torch_has_the_same_vector_width(limit: dict[str, str]) -> None:
    code = "import sys; from streamtrain.ops.cpu.features import cpu_features; found = cpu_features()\n"
    code += "assert 'torch' not in sys.modules\n"
    code += "import torch; print(torch.backends.cpu.get_cpu_capability(), 'avx512' in found, 'avx2' in found)"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **limit, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    capability, avx512, avx2 = run.stdout.split()
    if "ONEDNN_MAX_CPU_ISA" not in os.environ:
        assert avx512 == str(capability == "AVX512")
        assert avx2 == str(capability in ("AVX2", "AVX512"))
    assert avx512 == "False" or "ATEN_CPU_CAPABILITY" not in limit


def test_the_cpu_option_applies_to_torch_and_to_streamtrain(pytestconfig: pytest.Config) -> None:
    chosen = pytestconfig.getoption("--cpu")
    if chosen == "native":
        pytest.skip("needs --cpu avx2 or --cpu avx512")
    assert torch.backends.cpu.get_cpu_capability() == chosen.upper()
    assert sorted(cpu_features()) == {"avx2": ["avx2"], "avx512": ["avx2", "avx512"]}[chosen]
