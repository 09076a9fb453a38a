"""Forward, targets and losses on the CUDA tensors of a step, without a GPU and without values.

It shows devices, dtypes and host syncs, not values. There is no backward, which needs a driver.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from streamtrain.ops.cpu.build import compiler

SCRIPT = Path(__file__).with_name("fake_gpu_step.py")
# registers a CUDA device whose guard does nothing
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""
IBOT = "giant_gram.yaml"
FROZEN = "vits16.yaml teacher.kind=frozen teacher.weights=nowhere engine.checkpointing=none"
L2 = "vits16.yaml objective.centering=softmax objective.patch_loss.kind=l2 objective.gram.level=batch"
COSINE = "vits16.yaml objective.patch_loss.kind=cosine objective.gram.negatives=drop objective.gram.tokens=masked"
LOSSES = {"total", "global", "patch", "koleo", "gram", "mass"}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile what lets a torch without CUDA index CUDA tensors."""
    folder, torch_folder = tmp_path_factory.mktemp("guard"), Path(torch.__file__).parent
    if torch.backends.cuda.is_built():
        return folder
    if shutil.which(compiler()) is None:
        pytest.skip("there is no C++ compiler")
    (folder / "guard.cpp").write_text(GUARD)
    command = [compiler(), "-std=c++20", "-fPIC", "-shared", f"-I{torch_folder / 'include'}", folder / "guard.cpp"]
    command += ["-o", folder / "guard.so", f"-L{torch_folder / 'lib'}", "-lc10"]
    subprocess.run(command, check=True)
    return folder / "guard.so"


def run_cases(library: Path, *cases: str) -> dict[str, Any]:
    # a process of its own, because the device stays registered
    ((status, out, errors),) = run_ranks([SCRIPT, library, *cases], 1)
    assert status == 0, errors[-3000:]
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def test_a_forward_stays_on_the_gpu_and_its_losses_are_fp32(library: Path) -> None:
    for case, found in run_cases(library, IBOT, L2, COSINE, FROZEN).items():
        assert not found["faults"], (case, found["faults"])
        centers = {"center of global_head"} if case == L2 else set()
        assert found["results"] == dict.fromkeys(LOSSES | centers, "cuda:0 torch.float32"), case
        # fp32 logits of 16-bit features and prototypes
        assert found["operations"]["mm.dtype bfloat16"] > 0, case


@pytest.mark.slow
def test_what_a_gpu_should_not_do_is_found(library: Path) -> None:
    mutants = ("read", "loss in bf16", "logits in bf16", "indices on the host", "blocking copy")
    found = run_cases(library, *mutants)
    faults = {mutant: list(found[mutant]["faults"]) for mutant in mutants}
    assert faults["read"] == ["_local_scalar_dense.default reads a value"]
    assert found["loss in bf16"]["results"]["koleo"] == "cuda:0 torch.bfloat16"
    assert "mm.default makes 16-bit logits" in faults["logits in bf16"]
    assert any("on the cpu" in fault for fault in faults["indices on the host"])
    assert "_to_copy.default from cpu to cuda is blocking" in faults["blocking copy"]
