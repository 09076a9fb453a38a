"""Values of a GPU that are kept in pinned host memory: copies run on streams of their own, beside the computation.

Neither the host nor the computation waits for a copy before it needs the values. Memory on the GPU is allocated, freed
and reused in the order of the compute stream.
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
# activations that are still on the GPU while they are copied
COPIED_AT_ONCE = 2


def staged_chunks(home: Sequence[Tensor], device: torch.device, chunk: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Iterate over ``chunk`` values at a time of flat tensors of equal size, on ``device``; changes are stored.

    ``home`` is on the device, or on its host in pinned memory.
    """
    parts = [slice(start, min(start + chunk, len(home[0]))) for start in range(0, len(home[0]), chunk)]
    if home[0].device == device:
        yield from ((part, [each[part] for each in home]) for part in parts)
        return
    compute, loads, stores = torch.cuda.current_stream(), torch.cuda.Stream(device), torch.cuda.Stream(device)
    buffers = [[torch.empty_like(each[parts[0]], device=device) for each in home] for _ in range(BUFFERS)]
    # the memory of the buffers, and earlier changes of ``home``
    loads.wait_stream(compute)
    stored: list[torch.cuda.Event] = []

    def load(index: int) -> tuple[list[Tensor], torch.cuda.Event]:
        part = parts[index]
        values = [each[: part.stop - part.start] for each in buffers[index % BUFFERS]]
        if index >= BUFFERS:
            loads.wait_event(stored[index - BUFFERS])
        with torch.cuda.stream(loads):
            for value, each in zip(values, home, strict=True):
                value.copy_(each[part], non_blocking=True)
        return values, loads.record_event()

    following = load(0)
    for index, part in enumerate(parts):
        values, loaded = following
        if index + 1 < len(parts):
            following = load(index + 1)
        compute.wait_event(loaded)
        yield part, values
        stores.wait_stream(compute)
        with torch.cuda.stream(stores):
            for value, each in zip(values, home, strict=True):
                each[part].copy_(value, non_blocking=True)
        stored.append(stores.record_event())
    compute.wait_stream(stores)


@dataclass
class _Kept:
    """A tensor in host memory."""

    values: Tensor
    device: torch.device
    is_copied: torch.cuda.Event
    # on the GPU again, with the event of its copy
    loaded: tuple[Tensor, torch.cuda.Event] | None = None


class KeptOnHost(saved_tensors_hooks):
    """Within this context, tensors on a GPU that autograd saves are kept in host memory until the backward.

    Enter one instance for all saved tensors of a forward pass, and call ``finish`` at its end. While the backward uses
    a tensor, the one saved before it is loaded.
    """

    def __init__(self) -> None:
        super().__init__(self._pack, self._unpack)
        self._kept: list[_Kept] = []
        self._being_copied: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

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
        is_copied = stores.record_event()
        self._kept.append(_Kept(values, tensor.device, is_copied))
        self._being_copied.append((tensor.detach(), is_copied))
        self._wait_for_copies(COPIED_AT_ONCE)
        return len(self._kept) - 1

    def _unpack(self, packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        tensor, is_loaded = self._load(packed)
        torch.cuda.current_stream().wait_event(is_loaded)
        self._kept[packed].loaded = None
        if packed:
            self._load(packed - 1)
        return tensor

    def _load(self, index: int) -> tuple[Tensor, torch.cuda.Event]:
        """Start to copy a tensor to the GPU, unless that is under way."""
        kept = self._kept[index]
        if kept.loaded is None:
            assert self._streams is not None
            _, loads = self._streams
            tensor = torch.empty(kept.values.shape, dtype=kept.values.dtype, device=kept.device)
            # the memory may still be in use by earlier operations
            loads.wait_stream(torch.cuda.current_stream())
            loads.wait_event(kept.is_copied)
            with torch.cuda.stream(loads):
                tensor.copy_(kept.values, non_blocking=True)
            kept.loaded = tensor, loads.record_event()
        return kept.loaded

    def _wait_for_copies(self, remaining: int) -> None:
        while len(self._being_copied) > remaining:
            _, is_copied = self._being_copied.popleft()
            torch.cuda.current_stream().wait_event(is_copied)
