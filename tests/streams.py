"""Find races between CUDA streams on a CPU.

Operations run at once, on the CPU. Streams, events and waits are only recorded, and so is the last writer and the
readers of each range of memory. Two accesses on different streams, at least one of them a write, are a fault if no
event or wait orders them; so is memory that is freed while another stream may still use it (no ``record_stream``).
Accesses through raw pointers, by other libraries, are not seen.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import CodeType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.cuda._sanitizer import StreamSynchronizations
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

Place = tuple[tuple[CodeType, int], ...]
# results of collectives, by the position of the argument that holds them
_COLLECTIVE_RESULTS = {
    "_allgather_base_": 0, "allgather_": 0, "allgather_into_tensor_coalesced_": 0, "_reduce_scatter_base_": 0,
    "reduce_scatter_": 0, "reduce_scatter_tensor_coalesced_": 0, "allreduce_": 0, "broadcast_": 0,
}  # fmt: skip
# operations whose result comes back to the host
_HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")
_NOT_SHOWN = ("/torch/", "/tests/streams.py", "/nvtx.py", "/comm/", "runpy", "contextlib")


@dataclass(frozen=True)
class Access:
    """One access to a range of bytes of a storage."""

    stream: int
    time: int
    writes: bool
    begin: int
    end: int
    operation: str
    place: Place

    def __str__(self) -> str:
        lines = [f"{code.co_filename.rpartition('/')[2]}:{line} {code.co_name}" for code, line in self.place]
        return f"{'write' if self.writes else 'read'} by {self.operation} on stream {self.stream} ({' < '.join(lines)})"


@dataclass
class _Memory:
    """The accesses to one storage; ``owner``: the stream that allocated it, None if that was before the check."""

    owner: int | None
    accesses: list[Access] = field(default_factory=list)
    # streams whose use the allocator waits for
    recorded: set[int] = field(default_factory=set)
    # bytes, if allocated in the watched file
    watched: int = 0


class Streams:
    """A device of streams that exist only in this record.

    Attributes:
        faults: number of times by description.
        host_waits: number of times that the host waited for the device, by kind and place.
        late_bytes: freed memory that the allocator could reuse only once the device had got there, because of another
            stream; a host that is far ahead would need as much again.
        watched_file: name of a Python file whose allocations are counted from now on.
        watched_peak: most of their bytes at a time.
    """

    def __init__(self, *, ordered_by_reads: bool = True) -> None:
        """``ordered_by_reads``: False ignores that a value read by the host waits for its stream, which hides races."""
        self.faults: Counter[str] = Counter()
        self.host_waits: Counter[str] = Counter()
        self.late_bytes = self.watched_peak = self._watched_bytes = 0
        self.watched_file = ""
        self._ordered_by_reads = ordered_by_reads
        self._lock = threading.RLock()
        self._order = StreamSynchronizations()
        self._times, self._ids = itertools.count(1), itertools.count(1)
        self._thread = threading.local()
        self._memory: dict[int, _Memory] = {}
        self.default = _Stream(self, 0)
        self._collectives = self.stream()

    def stream(self, device: object = None, priority: int = 0, **_: object) -> _Stream:
        number = next(self._ids)
        with self._lock:
            self._order.create_stream(number)
        return _Stream(self, number)

    def event(self, *_: object, **__: object) -> _Event:
        number = next(self._ids)
        with self._lock:
            self._order.create_event(number)
        return _Event(self, number)

    def current(self, device: object = None) -> _Stream:
        return getattr(self._thread, "stream", self.default)

    @contextmanager
    def on(self, stream: _Stream | None) -> Iterator[None]:
        before = self.current()
        self._thread.stream = stream or before
        try:
            yield
        finally:
            self._thread.stream = before

    def synchronize(self, device: object = None) -> None:
        with self._lock:
            self._note_wait("device")
            self._order.sync_all_streams()

    @contextmanager
    def installed(self, accelerator: type | None = None) -> Iterator[None]:
        """Replace CUDA's streams by these, also in a DeepSpeed ``accelerator``, and record this thread.

        Other threads enter ``recording`` themselves.
        """
        replaced: list[tuple[Any, str, Any]] = [
            (torch.cuda, "Stream", self.stream), (torch.cuda, "Event", self.event), (torch.cuda, "stream", self.on),
            (torch.cuda, "current_stream", self.current), (torch.cuda, "synchronize", self.synchronize),
            (torch.cuda, "default_stream", lambda device=None: self.default),
            (torch.Tensor, "record_stream", lambda tensor, stream: self._record_stream(tensor, stream)),
            (dist.Work, "wait", self._waiting(dist.Work.wait)),
        ]  # fmt: skip
        # they read no CPU tensor through an operation
        replaced += [(torch.Tensor, name, self._reading(getattr(torch.Tensor, name))) for name in ("tolist", "cpu")]
        if accelerator is not None:
            # as a GPU answers
            replaced += [
                (accelerator, name, lambda _: False)
                for name in (
                    "is_synchronized_device", "resolves_data_dependency", "handles_memory_backpressure",
                    "use_host_timers",
                )
            ]  # fmt: skip
            replaced += [
                (accelerator, "Stream", property(lambda _: self.stream)),
                (accelerator, "Event", property(lambda _: self.event)),
                (accelerator, "stream", lambda _, stream: self.on(stream)),
                (accelerator, "current_stream", lambda _, device=None: self.current()),
                (accelerator, "default_stream", lambda _, device=None: self.default),
                (accelerator, "synchronize", lambda _, device=None: self.synchronize()),
            ]
        with ExitStack() as stack:
            for owner, name, value in replaced:
                stack.enter_context(mock.patch.object(owner, name, value))
            with self.recording():
                yield

    def recording(self) -> TorchDispatchMode:
        """Return a context that records the operations of the calling thread."""
        return _Recorder(self)

    def _waiting(self, wait: Any) -> Any:
        def waiting(work: Any, *arguments: Any, **more: Any) -> Any:
            with _disable_current_modes():  # gloo copies here
                result = wait(work, *arguments, **more)
            self.current().wait_stream(self._collectives)
            return result

        return waiting

    def _reading(self, read: Any) -> Any:
        def reading(tensor: torch.Tensor, *arguments: Any, **more: Any) -> Any:
            with self._lock:
                self._note_read(self.current().number)
            return read(tensor, *arguments, **more)

        return reading

    def _note_read(self, stream: int) -> None:
        self._note_wait("read")
        if self._ordered_by_reads:
            self._order.all_streams_wait_for_stream(stream)

    def _record_stream(self, tensor: torch.Tensor, stream: _Stream) -> None:
        with self._lock:
            self._memory_of(tensor, None).recorded.add(stream.number)

    def _note_wait(self, kind: str) -> None:
        places = [f"{code.co_filename.rpartition('/')[2]}:{line} {code.co_name}" for code, line in _place(1)]
        self.host_waits[f"{kind} at {places[0] if places else 'unknown'}"] += 1

    def _memory_of(self, tensor: torch.Tensor, owner: int | None) -> _Memory:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._memory:
            self._memory[key] = memory = _Memory(owner)
            if owner is not None and self.watched_file and _is_within(self.watched_file):
                memory.watched = storage.nbytes()
                self._watched_bytes += memory.watched
                self.watched_peak = max(self.watched_peak, self._watched_bytes)
            weakref.finalize(storage, self._free, key, storage.nbytes()).atexit = False
        return self._memory[key]

    def _free(self, key: int, num_bytes: int) -> None:
        with self._lock:
            memory = self._memory.pop(key, None)
            if memory is None or memory.owner is None:
                return
            self._watched_bytes -= memory.watched
            unordered = [
                access
                for access in memory.accesses
                if access.stream != memory.owner
                and not self._order.is_ordered_after(memory.owner, access.time, access.stream)
            ]
            if any(access.stream in memory.recorded for access in unordered):
                self.late_bytes += num_bytes
            for access in unordered:
                if access.stream not in memory.recorded:
                    self.faults[f"freed by stream {memory.owner} before the end of the {access}"] += 1

    def _access(self, tensor: torch.Tensor, writes: bool, operation: str, stream: int, is_new: bool = False) -> None:
        memory = self._memory_of(tensor, stream if is_new else None)
        if not tensor.numel():
            return
        size = tensor.element_size()
        begin = tensor.storage_offset() * size
        end = begin + size * (1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)))
        time = self._order.current_sync_states[stream][stream]
        new = Access(stream, time, writes, begin, end, operation, _place())
        kept = []
        for old in memory.accesses:
            overlaps = old.begin < end and begin < old.end
            conflicts = overlaps and old.stream != stream and (writes or old.writes)
            if conflicts and not self._order.is_ordered_after(stream, old.time, old.stream):
                self.faults[f"{new} is not ordered after the {old}"] += 1
            covers = begin <= old.begin and old.end <= end
            # whatever is ordered after the new access is ordered after these
            if not (covers and (writes or (old.stream == stream and not old.writes))):
                kept.append(old)
        memory.accesses = [*kept, new]

    def _advance(self, stream: int) -> None:
        self._order.update_seq_num(stream, next(self._times))


class _Stream:
    """A stand-in for ``torch.cuda.Stream``."""

    def __init__(self, streams: Streams, number: int) -> None:
        self.streams, self.number = streams, number
        self.cuda_stream, self.device = number, torch.device("cpu")

    def wait_stream(self, other: _Stream) -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: _Event) -> None:
        with self.streams._lock:
            self.streams._order.stream_wait_for_event(self.number, event.number)

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or self.streams.event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        with self.streams._lock:
            self.streams._note_wait("stream")
            self.streams._order.all_streams_wait_for_stream(self.number)

    def query(self) -> bool:
        return False


class _Event:
    """A stand-in for ``torch.cuda.Event``; the device is always behind."""

    def __init__(self, streams: Streams, number: int) -> None:
        self.streams, self.number = streams, number

    def record(self, stream: _Stream | None = None) -> None:
        with self.streams._lock:
            self.streams._order.record_state(self.number, (stream or self.streams.current()).number)

    def wait(self, stream: _Stream | None = None) -> None:
        (stream or self.streams.current()).wait_event(self)

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        with self.streams._lock:
            self.streams._note_wait("event")
            self.streams._order.all_streams_wait_for_event(self.number)


class _Recorder(TorchDispatchMode):
    """Records the accesses of each operation before and after it runs."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self._streams = streams

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, streams, schema = kwargs or {}, self._streams, operation._schema
        name = schema.name.rpartition("::")[2]
        if schema.name.startswith("c10d::"):
            if name != "barrier":
                self._record_collective(name, args)
            return operation(*args, **kwargs)
        # these read no values of their arguments
        is_factory = name.startswith(("empty", "new_")) or name.endswith("_like")
        with streams._lock:
            stream = streams.current().number
            streams._advance(stream)
            values = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
            for argument in schema.arguments:
                alias = argument.alias_info
                # a view of the argument touches no memory
                if is_factory or (alias is not None and not alias.is_write):
                    continue
                for tensor in _tensors(values.get(argument.name)):
                    streams._access(tensor, alias is not None, name, stream)
            if name in _HOST_READS:
                streams._note_read(stream)
        result = operation(*args, **kwargs)
        with streams._lock:
            results = (result,) if len(schema.returns) == 1 else result or ()
            for returned, value in zip(schema.returns, results, strict=False):
                for tensor in _tensors(value) if returned.alias_info is None else ():
                    if "empty" in name:
                        streams._memory_of(tensor, stream)
                    else:
                        streams._access(tensor, True, name, stream, is_new=True)
        return result

    def _record_collective(self, name: str, args: Any) -> None:
        streams = self._streams
        group = streams._collectives
        group.wait_stream(streams.current())
        with streams._lock:
            streams._advance(group.number)
            for position, value in enumerate(args):
                for tensor in _tensors(value):
                    streams._access(tensor, _COLLECTIVE_RESULTS.get(name) == position, name, group.number)
                    # NCCL keeps the tensors it works on
                    streams._memory_of(tensor, None).recorded.add(group.number)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _is_within(file: str) -> bool:
    """Return whether a function of ``file`` is running in this thread."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(file):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


_is_shown: dict[CodeType, bool] = {}


def _place(count: int = 2) -> Place:
    """Return the innermost lines outside of torch."""
    frame, found = sys._getframe(1), []
    while frame is not None and len(found) < count:
        code = frame.f_code
        if code not in _is_shown:
            _is_shown[code] = not any(part in code.co_filename for part in _NOT_SHOWN)
        if _is_shown[code]:
            found.append((code, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(found)
