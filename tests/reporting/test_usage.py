"""Memory metrics of a GPU, from stand-ins for its driver."""

from __future__ import annotations

import pytest
import torch

from streamtrain.reporting.usage import memory_scalars, peak_bytes


def test_the_peak_of_a_gpu_has_the_parts_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's reserved peak, and the memory that the context and libraries hold outside of it."""
    numbers = {"mem_get_info": (50, 100), "memory_reserved": 30, "max_memory_reserved": 45}
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    device = torch.device("cuda", 0)
    assert peak_bytes(device) == memory_scalars(device)["memory/gpu_bytes"] == 45 + (100 - 50 - 30)


def test_the_peak_without_a_gpu_is_that_of_the_process() -> None:
    scalars = memory_scalars(torch.device("cpu"))
    assert "memory/gpu_bytes" not in scalars and scalars["memory/peak_rss_bytes"] >= scalars["memory/rss_bytes"] > 1e6
