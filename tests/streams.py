"""Find races between CUDA streams on a CPU.

Operations run at once, on the CPU. Streams, events and waits are only recorded, and so is the last writer and the
readers of each range of memory. Two accesses on different streams, at least one of them a write, are a fault if no
event or wait orders them; so is memory that is freed while another stream may still use it (no ``record_stream``).
Accesses through raw pointers, by other libraries, are not seen.

All tensors are taken as device tensors, except those in host memory: pinned ones, and in a thread that records with
``of_host`` also new ones and copies to the CPU. An operation on host tensors runs on the host, at once: it is a fault
if a stream may still use the same memory. A copy between host and device runs on the stream, and the host waits for it
unless it is ``non_blocking``.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
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
# operations that make a tensor in host memory on the CPU, and on the device if a device is given
_FACTORIES = ("empty", "zeros", "ones", "full", "rand", "randn", "arange", "scalar_tensor")
# the "stream" of operations that the host computes itself
HOST = -1
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
        where = "on the host" if self.stream == HOST else f"on stream {self.stream}"
        return f"{'write' if self.writes else 'read'} by {self.operation} {where} ({' < '.join(lines)})"


@dataclass
class _Memory:
    """The accesses to one storage; ``owner``: the stream that allocated it, None if that was before the check."""

    owner: int | None
    accesses: list[Access] = field(default_factory=list)
    # streams whose use the allocator waits for
    recorded: set[int] = field(default_factory=set)
    is_host: bool = False
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
        """``ordered_by_reads``: False ignores that a value read by the host waits for its stream, which hides races.

        A blocking copy to host memory always counts as a wait.
        """
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
        # by stream, the time until which the thread of ``of_host`` has waited for it
        self._waited_by_thread: dict[int, int] = {}
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
    def installed(self, accelerator: type | None = None, is_recorded: bool = True) -> Iterator[None]:
        """Replace CUDA's streams by these, also in a DeepSpeed ``accelerator``, and record this thread.

        Other threads enter ``recording`` themselves. Without ``is_recorded`` nothing is checked.
        """
        replaced: list[tuple[Any, str, Any]] = [
            (torch.cuda, "Stream", self.stream), (torch.cuda, "Event", self.event), (torch.cuda, "stream", self.on),
            (torch.cuda, "current_stream", self.current), (torch.cuda, "synchronize", self.synchronize),
            (torch.cuda, "default_stream", lambda device=None: self.default),
            # new tensors of a GPU are made without one
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.Tensor, "record_stream", lambda tensor, stream: self._record_stream(tensor, stream)),
            (dist.Work, "wait", self._waiting(dist.Work.wait)),
        ]  # fmt: skip
        # they read no CPU tensor through an operation
        replaced += [(torch.Tensor, name, self._reading(getattr(torch.Tensor, name))) for name in ("tolist", "cpu")]
        replaced += [(torch.Tensor, "to", self._moving(torch.Tensor.to))]
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
                # a new object: DeepSpeed's is changed by the product
                (accelerator, "default_stream", lambda _, device=None: _Stream(self, 0)),
                (accelerator, "synchronize", lambda _, device=None: self.synchronize()),
            ]
        with ExitStack() as stack:
            for owner, name, value in replaced:
                stack.enter_context(mock.patch.object(owner, name, value))
            with self.recording() if is_recorded else nullcontext():
                yield

    def recording(self, of_host: bool = False) -> TorchDispatchMode:
        """Return a context that records the operations of the calling thread.

        ``of_host``: the tensors that it makes without a device, and copies to the CPU, are in host memory.
        """
        return _Recorder(self, of_host)

    def is_host(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is in host memory."""
        memory = self._memory.get(tensor.untyped_storage()._cdata)
        return memory is not None and memory.is_host

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

    def _moving(self, to: Any) -> Any:
        """Return ``Tensor.to`` that copies between host and device, which are both the CPU here."""

        def moving(tensor: torch.Tensor, *arguments: Any, **more: Any) -> Any:
            of_host = getattr(self._thread, "of_host", None)
            device = more.get("device", arguments[0] if arguments else None)
            name = torch.device(device).type if isinstance(device, str | torch.device) else ""
            if of_host is None or name not in ("cpu", "cuda"):
                return to(tensor, *arguments, **more)
            # a device object may name the run's device, which is the CPU here
            becomes_host = of_host and device == "cpu"
            # the values are on the CPU in any case
            rest = [each for each in arguments if each is not device]
            here = to(tensor, "cpu", *rest, **{key: value for key, value in more.items() if key != "device"})
            if self.is_host(here) == becomes_host:
                return here
            with _disable_current_modes():
                moved = torch.empty(here.shape, dtype=here.dtype)
            self._memory_of(moved, None if becomes_host else self.current().number).is_host = becomes_host
            return moved.copy_(here, non_blocking=more.get("non_blocking", False))

        return moving

    def _note_read(self, stream: int) -> None:
        self._note_wait("read")
        if self._ordered_by_reads:
            self._order.all_streams_wait_for_stream(stream)

    def _note_copy(self, stream: int, of_host: bool) -> None:
        self._note_wait("copy")
        if not of_host:
            self._order.all_streams_wait_for_stream(stream)
            return
        # only this thread has waited
        for number, time in self._order.current_sync_states[stream].items():
            self._waited_by_thread[number] = max(time, self._waited_by_thread.get(number, -1))

    def wait_for_thread(self) -> None:
        """Order later work after all that the thread of ``of_host`` has waited for; call it after a wait for it."""
        with self._lock:
            for state in (*self._order.current_sync_states.values(), self._order.host_sync_state):
                self._order._state_wait_for_other(state, self._waited_by_thread)

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
                if access.stream != memory.owner and not self._is_done(memory.owner, access)
            ]
            if any(access.stream in memory.recorded for access in unordered):
                self.late_bytes += num_bytes
            for access in unordered:
                if access.stream not in memory.recorded:
                    self.faults[f"freed by stream {memory.owner} before the end of the {access}"] += 1

    def _access(self, tensor: torch.Tensor, writes: bool, operation: str, stream: int, is_new: bool = False) -> None:
        memory = self._memory_of(tensor, stream if is_new and stream != HOST else None)
        memory.is_host |= is_new and stream == HOST
        if not tensor.numel():
            return
        size = tensor.element_size()
        begin = tensor.storage_offset() * size
        end = begin + size * (1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)))
        time = 0 if stream == HOST else self._order.current_sync_states[stream][stream]
        new = Access(stream, time, writes, begin, end, operation, _place())
        kept = []
        for old in memory.accesses:
            overlaps = old.begin < end and begin < old.end
            conflicts = overlaps and old.stream != stream and (writes or old.writes)
            if conflicts and not self._is_done(stream, old):
                self.faults[f"{new} is not ordered after the {old}"] += 1
            covers = begin <= old.begin and old.end <= end
            # whatever is ordered after the new access is ordered after these
            if not (covers and (writes or (old.stream == stream and not old.writes))):
                kept.append(old)
        # streams are given work after the host has done its own
        memory.accesses = memory.accesses if stream == HOST else [*kept, new]

    def _is_done(self, stream: int, access: Access) -> bool:
        """Return whether an access has ended before the next work of ``stream``, or of the host."""
        if stream == HOST:
            states = [self._order.host_sync_state, self._waited_by_thread if self._thread.of_host else {}]
            return any(access.time <= state.get(access.stream, -1) for state in states)
        return bool(self._order.is_ordered_after(stream, access.time, access.stream))

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

    def __init__(self, streams: Streams, of_host: bool) -> None:
        super().__init__()
        self._streams, self._of_host = streams, of_host

    def __enter__(self) -> _Recorder:
        self._streams._thread.of_host = self._of_host
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._streams._thread.of_host = None
        super().__exit__(*error)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, streams, schema = kwargs or {}, self._streams, operation._schema
        name = schema.name.rpartition("::")[2]
        if schema.name.startswith("c10d::"):
            if name != "barrier":
                self._record_collective(name, args)
            return operation(*args, **kwargs)
        if name == "is_pinned":
            return streams.is_host(args[0])
        makes_host = kwargs.get("pin_memory", False) or (self._of_host and name in _FACTORIES)
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        on_device = getattr(kwargs.get("device"), "type", "") == "cuda"
        if on_device:
            kwargs = {**kwargs, "device": torch.device("cpu")}
            makes_host = False
        # these read no values of their arguments
        is_factory = name.startswith(("empty", "new_")) or name.endswith("_like")
        with streams._lock:
            values = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
            on_host = {streams.is_host(tensor) for tensor in _tensors(list(values.values()))} or {makes_host}
            if is_factory and on_device:
                on_host = {False}
            stream = HOST if on_host == {True} else streams.current().number
            if stream != HOST:
                streams._advance(stream)
            for argument in schema.arguments:
                alias = argument.alias_info
                # a view of the argument touches no memory
                if is_factory or (alias is not None and not alias.is_write):
                    continue
                for tensor in _tensors(values.get(argument.name)):
                    streams._access(tensor, alias is not None, name, stream)
            if name in _HOST_READS and stream != HOST:
                streams._note_read(stream)
            if name == "copy_" and len(on_host) == 2 and not values.get("non_blocking"):
                streams._note_copy(stream, self._of_host)
        result = operation(*args, **kwargs)
        with streams._lock:
            results = (result,) if len(schema.returns) == 1 else result or ()
            for returned, value in zip(schema.returns, results, strict=False):
                for tensor in _tensors(value) if returned.alias_info is None else ():
                    # also of "empty": earlier operations of its stream may still use the memory
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
                    number = HOST if streams.is_host(tensor) else group.number
                    streams._access(tensor, _COLLECTIVE_RESULTS.get(name) == position, name, number)
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
