"""Memory that only a rank with a GPU has: decoder buffers, memory of other streams, rounding of pinned tensors.

torch's allocator of GPU memory keeps freed memory for the stream that allocated it. No other stream uses it again, so
the loader and the saver, which have streams of their own, add their temporaries to the memory of the step. The
allocator of pinned memory rounds every tensor up to a power of two.
"""

from __future__ import annotations

from collections.abc import Iterator

from streamtrain.planning.crops import appearance_bytes
from streamtrain.planning.parts import ALWAYS, BACKWARD, CHECKPOINT, LOSS, Part, part
from streamtrain.planning.sizes import Sizes

# DALI's defaults (``device_memory_padding``, ``host_memory_padding``), for each thread of the decoder
NVJPEG_DEVICE_BYTES, NVJPEG_PINNED_BYTES, NVJPEG_PINNED_BUFFERS = 16 * 2**20, 8 * 2**20, 2
# per value of a moment that a checkpoint reads: fp32; of 8-bit moments also the codes as indices and their values
READ_BYTES = {"host": 4, "disk": 4, "8bit": 12}


def pinned_bytes(num_bytes: int) -> int:
    """Return the bytes that torch allocates for a pinned tensor: the next power of two."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0


def offloaded_numels(s: Sizes) -> tuple[int, ...]:
    """Return the values of each flat tensor of this rank whose moments are not on the device."""
    ratio = s.config.engine.moments_ratio
    # the device keeps the moments of some whole blocks
    return tuple(numel - int((1.0 - ratio) * numel) // 256 * 256 for numel in s.flats)


def gpu_buffers(s: Sizes) -> Iterator[Part]:
    """Yield the buffers of the decoder, the loader and the saver on a GPU, and the rounding of pinned tensors."""
    if not s.on_gpu:
        return
    threads = (s.config.data.decode_threads or s.cores, "threads")
    yield part("nvJPEG's buffers", "gpu", ALWAYS, threads, (NVJPEG_DEVICE_BYTES, "B"))
    pinned = (NVJPEG_PINNED_BUFFERS, "buffers"), (NVJPEG_PINNED_BYTES, "B")
    yield part("nvJPEG's pinned buffers", "host", ALWAYS, threads, *pinned)
    yield from _loader_stream(s)
    yield from _saver_stream(s)
    yield from _pinned_rounding(s)


def _loader_stream(s: Sizes) -> Iterator[Part]:
    """Yield the temporaries of one batch's colours, which the loader's stream keeps; global and local crops follow."""
    num_bytes = appearance_bytes(s.config, s.config.data.micro_batch)
    yield part("temporaries of the loader's stream", "gpu", ALWAYS, (num_bytes, "B"))


def _saver_stream(s: Sizes) -> Iterator[Part]:
    """Yield the moments of one parameter, which the saver's stream keeps after the first copy for a checkpoint."""
    run, engine = s.config.run, s.config.engine
    if not run.save_in_background or engine.moments not in READ_BYTES:
        # masters, averages and moments on the device are copied without a temporary
        return
    is_during_steps = any(0 < every < run.steps for every in (run.checkpoint_every, run.snapshot_every))
    largest = (-(-s.largest_trained // s.world_size), "values of this rank")
    phases = ALWAYS if is_during_steps else CHECKPOINT
    yield part("temporaries of the saver's stream", "gpu", phases, largest, (READ_BYTES[engine.moments], "B"))


def _pinned_rounding(s: Sizes) -> Iterator[Part]:
    engine = s.config.engine
    if engine.moments == "host":
        excess = sum(pinned_bytes(4 * numel) - 4 * numel for numel in offloaded_numels(s))
        yield part("rounding of pinned moments", "host", ALWAYS, (2, "moments"), (excess, "B"))
    if s.config.teacher.average == "host":
        excess = sum(pinned_bytes(4 * numel) - 4 * numel for numel in s.flats)
        yield part("rounding of pinned averages", "host", ALWAYS, (excess, "B"))
    if engine.checkpointing == "block" and engine.offload_checkpoints:
        kept = s.tokens * s.config.model.dim * s.item
        factors = (s.config.model.depth, "blocks"), (pinned_bytes(kept) - kept, "B")
        yield part("rounding of pinned activations", "host", (LOSS, BACKWARD), *factors)
