"""Record ATen operations on tensors without values: kernels, and bytes of storages that they read and write."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from streamtrain.planning.operation_counts import Count

MATMULS = ("mm", "addmm", "bmm", "_scaled_mm")
ATTENTION = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")
# The destination is only touched where the source goes.
SCATTERS = ("index_add", "index_copy", "index_fill")
GATHERS = ("index_select", "gather", "embedding", "index")
WRITE_ONLY = ("copy", "fill", "zero", "normal", "uniform")
# kernels of the CUDA implementation, if not one
KERNELS = {"native_layer_norm_backward": 3, ATTENTION[1]: 3, "sort": 2}


# a storage by identity, and the offset of a tensor in it
Span = tuple[int, int]


@dataclass(frozen=True)
class Operation:
    """One ATen operation, with the bytes accessed of each span of a storage."""

    name: str
    reads: dict[Span, int]
    writes: dict[Span, int]
    # sums over rows, which a compiler cannot put into the kernel of another operation
    reduces_rows: bool

    @property
    def is_external(self) -> bool:
        """Whether a library computes it, so that a compiler fuses nothing into it."""
        return self.name in MATMULS or self.name in ATTENTION

    @property
    def kernels(self) -> int:
        return KERNELS.get(self.name, 1)

    @property
    def num_bytes(self) -> int:
        """Bytes that a memory-bound operation reads and writes."""
        return 0 if self.is_external else sum(self.reads.values()) + sum(self.writes.values())


class Recorder(TorchDispatchMode):
    """Record the operations that launch kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        # so that storages keep their identities; keeping tensors would let autograd copy gradients
        self._alive: list[torch.UntypedStorage] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        name = operation.overloadpacket.__name__
        outputs = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        self._alive += [each.untyped_storage() for each in (*outputs, *inputs)]
        schema = operation._schema
        written = [
            value
            for argument, value in (*zip(schema.arguments, args, strict=False), *_named(schema, kwargs))
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor)
        ]
        known = {_storage(each) for each in inputs}
        created = [each for each in outputs if _storage(each) not in known]
        if (not created and not written) or "empty" in name:
            return result
        # an operation in place of its own result, such as index_add by a backward
        written = written or created
        base = name.rstrip("_")
        name = base if base in WRITE_ONLY or base in SCATTERS else name
        only_written = name in WRITE_ONLY or any(each is kwargs.get("out") for each in written)
        reads = [each for each in inputs if not (only_written and _is_in(each, written))]
        if name in GATHERS:
            reads = [*reads[1:], *outputs]
        read_bytes, write_bytes = _bytes(reads), _bytes([*created, *written])
        if name in GATHERS:
            # as many bytes as the result, of the storage gathered from
            read_bytes[_span(inputs[0])] = read_bytes.pop(_span(outputs[0]))
        if name in SCATTERS:
            touched = _numel(inputs[-1]) * inputs[0].element_size()
            read_bytes[_span(inputs[0])] = write_bytes[_span(written[0])] = touched
        self.operations.append(Operation(name, read_bytes, write_bytes, _reduces_rows(name, inputs, outputs)))
        return result


def _named(schema: Any, kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    return ((argument, kwargs[argument.name]) for argument in schema.arguments if argument.name in kwargs)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _span(tensor: Tensor) -> Span:
    return _storage(tensor), int(tensor.storage_offset())


def _is_in(tensor: Tensor, tensors: Sequence[Tensor]) -> bool:
    return any(each is tensor for each in tensors)


def _numel(tensor: Tensor) -> int:
    """Return the number of different values of a tensor that may be expanded."""
    return math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)


def _bytes(tensors: Sequence[Tensor]) -> dict[Span, int]:
    return {_span(each): _numel(each) * each.element_size() for each in tensors}


def _reduces_rows(name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    if name == "native_layer_norm_backward":
        return True
    return name == "sum" and inputs[0].dim() > 1 and outputs[0].shape[-1:] == inputs[0].shape[-1:]


def eager(operations: Sequence[Operation]) -> Count:
    """Count each operation as its own kernels."""
    return Count(sum(each.kernels for each in operations), sum(each.num_bytes for each in operations))


def fused(operations: Sequence[Operation], final: set[int], recomputed: set[int]) -> Count:
    """Count as torch.compile fuses: all operations between two matmuls or attentions are one kernel.

    It reads its inputs once, without the ``recomputed`` storages, and writes what later kernels read or is ``final``. A
    scatter and a sum over rows need one kernel more each.
    """
    kernels = num_bytes = 0
    segment: list[Operation] = []
    for index, operation in enumerate([*operations, None]):
        if operation is not None and not operation.is_external:
            segment.append(operation)
            continue
        kernels += operation.kernels if operation is not None else 0
        used = final | _storages(operations[index:])
        skipped = recomputed | _written(segment)
        reads = _largest(each.reads for each in segment)
        writes = _largest(each.writes for each in segment)
        stored = [size for span, size in writes.items() if span[0] in used]
        num_bytes += sum(size for span, size in reads.items() if span[0] not in skipped) + sum(stored)
        kernels += bool(stored) + sum(each.reduces_rows or each.name in SCATTERS for each in segment)
        segment = []
    return Count(kernels, num_bytes)


def _storages(operations: Iterable[Operation]) -> set[int]:
    """Return the storages that the operations read."""
    return {storage for each in operations for storage, _ in each.reads}


def _written(operations: Iterable[Operation]) -> set[int]:
    return {storage for each in operations for storage, _ in each.writes}


def _largest(accesses: Iterable[dict[Span, int]]) -> dict[Span, int]:
    largest: dict[Span, int] = {}
    for access in accesses:
        for span, size in access.items():
            largest[span] = max(largest.get(span, 0), size)
    return largest


def trace(forward: Callable[[], Tensor | Sequence[Tensor]], with_backward: bool = True) -> dict[str, dict[str, Count]]:
    """Return the counts of ``forward`` and its backward, if any, by direction and by mode (eager and compiled)."""
    leaves: list[Tensor] = []
    with Recorder() as recorder, torch.set_grad_enabled(with_backward):
        result = forward()
        boundary = len(recorder.operations)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        if with_backward:
            leaves = _leaves(outputs)
            for each in leaves:
                each.grad = None
            torch.autograd.backward(outputs, [torch.empty_like(each) for each in outputs])
    first, second = recorder.operations[:boundary], recorder.operations[boundary:]
    # a compiled backward recomputes values from its inputs instead of reading them, except the factors of its matmuls
    final = {_storage(each) for each in outputs} | _storages(each for each in second if each.is_external)
    recomputed = _written(each for each in first if not each.is_external) - final
    gradients = {_storage(each.grad) for each in leaves if each.grad is not None}
    counts = {"forward": {"eager": eager(first), "compiled": fused(first, final, set())}}
    if with_backward:
        counts["backward"] = {"eager": eager(second), "compiled": fused(second, gradients, recomputed)}
    return counts


def _leaves(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors that the backward of ``outputs`` computes gradients of."""
    leaves: dict[int, Tensor] = {}
    todo, seen = [each.grad_fn for each in outputs], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        todo += [following for following, _ in node.next_functions]
    return list(leaves.values())
