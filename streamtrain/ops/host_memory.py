"""Keep GPU tensors in pinned host memory; copies run on side streams and overlap with the computation.

The host never waits for a copy; the compute stream waits only before it uses the values. Memory on the GPU is
allocated, freed and reused in the order of the compute stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

# chunks on the GPU at a time: one is loaded, one changed, one stored
BUFFERS = 3
# most activations being copied to the host at a time
COPIED_AT_ONCE = 2


def staged_chunks(stored: Sequence[Tensor], device: torch.device, chunk: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield flat tensors of equal size in chunks on ``device``; in-place changes are written back.

    ``stored`` is on the device, or on its host in pinned memory.
    """
    parts = [slice(start, min(start + chunk, len(stored[0]))) for start in range(0, len(stored[0]), max(1, chunk))]
    if not parts or stored[0].device == device:
        yield from ((part, [each[part] for each in stored]) for part in parts)
        return
    compute, loads, stores = torch.cuda.current_stream(), torch.cuda.Stream(device), torch.cuda.Stream(device)
    buffers = [[torch.empty_like(each[parts[0]], device=device) for each in stored] for _ in range(BUFFERS)]
    # earlier work may still use the buffers' memory or write ``stored``
    loads.wait_stream(compute)
    are_stored: list[torch.cuda.Event] = []

    def load(index: int) -> tuple[list[Tensor], torch.cuda.Event]:
        part = parts[index]
        values = [each[: part.stop - part.start] for each in buffers[index % BUFFERS]]
        if index >= BUFFERS:
            loads.wait_event(are_stored[index - BUFFERS])
        with torch.cuda.stream(loads):
            for value, each in zip(values, stored, strict=True):
                value.copy_(each[part], non_blocking=True)
        return values, loads.record_event()

    try:
        following = load(0)
        for index, part in enumerate(parts):
            values, is_loaded = following
            if index + 1 < len(parts):
                following = load(index + 1)
            compute.wait_event(is_loaded)
            yield part, values
            stores.wait_stream(compute)
            with torch.cuda.stream(stores):
                for value, each in zip(values, stored, strict=True):
                    each[part].copy_(value, non_blocking=True)
            are_stored.append(stores.record_event())
    finally:
        # before the buffers are freed, also if the caller fails
        compute.wait_stream(loads)
        compute.wait_stream(stores)


@dataclass
class _Offloaded:
    """A tensor in host memory."""

    values: Tensor
    device: torch.device
    # the copy on the GPU for the backward, with the event of its end
    loaded: tuple[Tensor, torch.cuda.Event] | None = None


class HostOffload:
    """Keeps the GPU tensors that autograd saves in host memory until the backward pass.

    Use one object for a forward pass: save one tensor within each ``with offload.hooks()``, and call ``finish`` at the
    end. The backward uses them in the opposite order; each use prefetches the tensor saved before it.
    """

    def __init__(self) -> None:
        self._offloaded: list[_Offloaded] = []
        self._being_copied: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

    def hooks(self) -> saved_tensors_hooks:
        """Return a context in which saved tensors are offloaded."""
        # an object that held its own hooks would be freed, with its pinned memory, only by the garbage collector
        return saved_tensors_hooks(self._pack, self._unpack)

    def finish(self) -> None:
        """Let the compute stream wait for the last copies, before the memory of their tensors is reused."""
        self._wait_for_copies(0)

    def _pack(self, tensor: Tensor) -> Tensor | int:
        if not tensor.is_cuda:
            return tensor
        if self._streams is None:
            self._streams = torch.cuda.Stream(tensor.device), torch.cuda.Stream(tensor.device)
        values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stores, _ = self._streams
        stores.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stores):
            values.copy_(tensor, non_blocking=True)
        self._offloaded.append(_Offloaded(values, tensor.device))
        self._being_copied.append((tensor.detach(), stores.record_event()))
        self._wait_for_copies(COPIED_AT_ONCE)
        return len(self._offloaded) - 1

    def _unpack(self, packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        tensor, is_loaded = self._load(packed)
        torch.cuda.current_stream().wait_event(is_loaded)
        self._offloaded[packed].loaded = None
        if packed:
            self._load(packed - 1)
        return tensor

    def _load(self, index: int) -> tuple[Tensor, torch.cuda.Event]:
        """Start to copy a tensor to the GPU, unless that is under way."""
        offloaded = self._offloaded[index]
        if offloaded.loaded is None:
            assert self._streams is not None
            _, loads = self._streams
            tensor = torch.empty(offloaded.values.shape, dtype=offloaded.values.dtype, device=offloaded.device)
            # for the copy to the host, which the compute stream has waited for, and earlier uses of the memory
            loads.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(loads):
                tensor.copy_(offloaded.values, non_blocking=True)
            offloaded.loaded = tensor, loads.record_event()
        return offloaded.loaded

    def _wait_for_copies(self, remaining: int) -> None:
        while len(self._being_copied) > remaining:
            _, is_copied = self._being_copied.popleft()
            torch.cuda.current_stream().wait_event(is_copied)
