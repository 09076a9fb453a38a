"""Memory in ``ops/host_memory.py``; the order of its copies is tested in ``tests/engine/test_stream_order.py``."""

from __future__ import annotations

import gc
import weakref

import torch

from streamtrain.ops.host_memory import HostOffload, staged_chunks


def test_offloaded_tensors_are_freed_with_the_backward_and_not_by_the_garbage_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        offload, values = HostOffload(), torch.ones(3, requires_grad=True)
        freed = weakref.ref(offload)
        with offload.hooks():
            total = values.square().sum()
        offload.finish()
        total.backward()
        del offload, total
        assert freed() is None
    finally:
        gc.enable()


def test_chunks_on_their_own_device_are_views() -> None:
    first, second = torch.zeros(10), torch.arange(10.0)
    for part, (one, other) in staged_chunks([first, second], torch.device("cpu"), 4):
        one.add_(other)
        assert len(one) == part.stop - part.start <= 4
    assert torch.equal(first, second)
    assert not list(staged_chunks([torch.empty(0)], torch.device("cpu"), 0))
