"""``engine.deterministic`` changes torch's settings for the time of a run."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from streamtrain.engine.runtime import deterministic_operations
from streamtrain.ops.attention import RopeTable, attend


def settings() -> dict[str, Any]:
    cuda = torch.backends.cuda
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "memory efficient": cuda.mem_efficient_sdp_enabled(), "cudnn": cuda.cudnn_sdp_enabled(),
        "flash": cuda.flash_sdp_enabled(), "plain": cuda.math_sdp_enabled(),
    }  # fmt: skip


def test_only_deterministic_operations_for_the_time_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = settings()
    with pytest.raises(ZeroDivisionError), deterministic_operations():
        expected = {"deterministic": True, "fill": False, "memory efficient": False, "cudnn": False}
        assert settings() == before | expected
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        raise ZeroDivisionError
    assert settings() == before


@pytest.mark.gpu
def test_gradients_of_attention_repeat() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    images, length, heads, size = 64, 261, 6, 64
    packed = torch.randn(images * length, 3 * heads * size, device="cuda", dtype=torch.bfloat16, generator=generator)
    gradient = torch.randn(images * length, heads * size, device="cuda", dtype=torch.bfloat16, generator=generator)
    angles = torch.rand(length, 1, 1, size, device="cuda", generator=generator)
    table = RopeTable(angles.cos().bfloat16(), angles.sin().bfloat16())
    results = []
    with deterministic_operations():
        for _ in range(5):
            leaf = packed.clone().requires_grad_()
            attend(leaf, [len(leaf)], [table], heads).backward(gradient)
            results.append(leaf.grad)
    assert all(torch.equal(result, results[0]) for result in results)
