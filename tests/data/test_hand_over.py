"""The loader's thread hands batches over on a stream of its own, checked on recorded streams (``streams``)."""

from __future__ import annotations

import queue
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from streams import Streams

from streamtrain.config.load import build
from streamtrain.data import producer as producer_module
from streamtrain.data.augment import draw_views
from streamtrain.data.masking import draw_masks
from streamtrain.data.producer import PendingBatch, Producer

BATCH, STEPS = 3, 4
CONFIG = build(
    {
        "run": {"dir": "nowhere"},
        "data": {"micro_batch": BATCH},
        "crops": {"global_size": 32, "local_size": 16, "local_count": 2},
        "model": {"patch_size": 8, "depth": 2, "dim": 36, "num_heads": 3},
    }
)


def produce(streams: Streams, ready: queue.Queue[PendingBatch | None]) -> None:
    """Assemble batches of noise as the loader's thread does for a GPU."""
    made = Producer(None, iter(()), CONFIG, torch.device("cpu"), None, 0, 1)  # type: ignore[arg-type]
    with streams.recording():
        stream = torch.cuda.Stream()
        for step in range(STEPS):
            slots = np.arange(BATCH) + BATCH * step
            sizes = CONFIG.crop_sizes[0]
            views = draw_views(CONFIG.crops, 0, slots, np.full((BATCH, 2), 64, np.int32))
            masks = draw_masks(CONFIG.masks, 0, slots, 2, (4, 4))
            item: Any = SimpleNamespace(samples=SimpleNamespace(slots=slots), views=views, masks=masks, sizes=sizes)
            with torch.cuda.stream(stream):
                sides = (32, 32, 16, 16)
                crops = [torch.randint(0, 255, (BATCH, side, side, 3), dtype=torch.uint8) for side in sides]
            decoded = [SimpleNamespace(as_tensor=lambda crop=crop: crop) for crop in crops]
            ready.put(made._assemble(item, decoded, stream, None))
    ready.put(None)


@pytest.mark.parametrize("missing", [None, "wait", "record_stream", "event"])
def test_a_batch_is_used_after_it_is_made_and_freed_after_it_is_used(
    missing: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams, ready = Streams(), queue.Queue[PendingBatch | None](1)
    # the crops of the stand-in for DALI are tensors already
    monkeypatch.setattr(producer_module.torch, "from_dlpack", lambda tensor: tensor)
    with streams.installed():
        thread = threading.Thread(target=produce, args=(streams, ready))
        thread.start()
        if missing == "wait":
            monkeypatch.setattr(type(streams.default), "wait_event", lambda self, event: None)
        elif missing == "record_stream":
            monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        elif missing == "event":
            monkeypatch.setattr("streams._Event.record", lambda self, stream=None: None)
        while (pending := ready.get()) is not None:
            batch = pending.wait()
            used = [tensor * 1 for tensor in batch.tensors()]
            assert len(used) > 3
            del batch, pending
        thread.join()
    assert bool(streams.faults) == (missing is not None), streams.faults
    assert not streams.host_waits


def test_the_thread_uses_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread is on GPU 0, where a stream would make a context of this process."""
    calls: list[object] = []

    class Stop(Exception):
        pass

    def stream(device: torch.device) -> None:
        calls.append("stream")
        raise Stop

    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    device = torch.device("cuda", 3)
    made = Producer(None, iter(()), CONFIG, device, None, 0, 1)  # type: ignore[arg-type]
    with pytest.raises(Stop):
        next(made.batches())
    assert calls == [device, "stream"]
