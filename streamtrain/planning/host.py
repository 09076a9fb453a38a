"""Host memory of a rank beside its network, and disk space."""

from __future__ import annotations

import math
from collections.abc import Iterator

from shards.reading.source import BATCHES_AHEAD
from streamtrain.ops.configure import KEPT_BYTES, MAPPED_BYTES
from streamtrain.planning.crops import sample_bytes
from streamtrain.planning.parts import (
    ALWAYS,
    BACKWARD,
    CHECKPOINT,
    EVALUATION,
    LOSS,
    STEP_PHASES,
    TARGETS,
    TEACHER,
    Part,
    part,
)
from streamtrain.planning.shapes import backbone_shapes
from streamtrain.planning.sizes import Sizes

# Python with torch, DeepSpeed and DALI, in the middle of what runs measured (benchmarks/results/memory_of_runs.json)
PROCESS_BYTES = 870_000_000
# the share of the available memory that the copies of checkpoints may use
COPY_SHARE = 0.8
# limit of the similarities of kNN in memory; ``evaluation/knn.py`` uses it
SIMILARITY_BYTES = 2**28
# bytes of a checkpoint per trained parameter (master, two moments and average in fp32), and per frozen one
SAVED_BYTES, SAVED_FROZEN_BYTES = 16, 4


def host_buffers(s: Sizes) -> Iterator[Part]:
    data, crops = s.config.data, s.config.crops
    yield part("process and libraries (allowance)", "host", ALWAYS, (PROCESS_BYTES, "B"))
    encoded = min(data.read_ahead_bytes, BATCHES_AHEAD * data.micro_batch * s.stored.num_bytes)
    yield part("encoded images ahead", "host", ALWAYS, (encoded, "B"))
    pixels = crops.global_count * crops.global_size.pixels + crops.local_count * crops.local_size.pixels
    batch, decoded = (data.micro_batch, "images"), data.pixels.num_bytes * s.stored.pixels
    pixels *= data.pixels.crop_bytes
    if s.on_gpu:
        sample = (pixels + decoded, "B")
        yield part("DALI and pinned crops", "host", ALWAYS, (data.prefetch + 2, "batches"), batch, sample)
        yield part("DALI's buffers", "gpu", ALWAYS, (data.prefetch + 1, "batches"), batch, sample)
    else:
        yield part("crops ahead", "host", ALWAYS, (2, "batches"), batch, (pixels, "B"))
        yield part("decoded images", "host", ALWAYS, (data.prefetch + 1, "batches"), batch, (decoded, "B"))
        threads = (min(data.decode_threads or s.cores, data.micro_batch), "threads")
        yield part("temporaries of crops", "host", ALWAYS, threads, (sample_bytes(s.config, s.stored.pixels), "B"))
    # checkpoints are read and written one fragment at a time; initial values are drawn for a full parameter
    yield part("one parameter in fp32", "host", ALWAYS, (s.largest_whole, "values"), (4, "B"))


def evaluation_buffers(s: Sizes) -> Iterator[Part]:
    """Yield the buffers of the evaluation while training, beside the teacher's activations."""
    evaluation, crops, pixels = s.config.evaluation, s.config.crops, s.config.data.pixels
    if not evaluation.every or not evaluation.evaluators:
        return
    train, test = evaluation.images, evaluation.images // 4
    # fp32 features of each rank's images: of the batches, joined, and normalised
    values = (s.config.model.dim, "values")
    own = (-(-train // s.world_size) + -(-test // s.world_size), "images of this rank")
    yield part("evaluation's features", "gpu", EVALUATION, own, values, (3 * 4, "B"))
    # Of the reference beside the evaluation set, and of the start: of all images in the host, then of this rank. A run
    # without a trained start needs less, but the plan does not know whether it starts from a checkpoint.
    sets = (1 + (evaluation.reference is not None), "sets")
    yield part("features of the reference and of the start", "gpu", EVALUATION, sets, own, values, (4 * 4, "B"))
    yield part("file of features at the start", "host", EVALUATION, sets, (train + test, "images"), values, (4, "B"))
    similarities = min(4 * -(-train // s.world_size) * test, SIMILARITY_BYTES)
    yield part("evaluation's similarities", "gpu", EVALUATION, (similarities, "B"))
    # cropped ahead of the network, two batches and the current one, and one decoded image per thread
    batch = (crops.global_count * s.config.data.micro_batch, "images")
    crop = (pixels.crop_bytes * s.config.square_side**2, "B")
    yield part("evaluation's crops", "host", EVALUATION, (3, "batches"), batch, crop)
    yield part(
        "evaluation's decoded images",
        "host",
        EVALUATION,
        (s.cores, "threads"),
        (pixels.num_bytes * s.stored.pixels, "B"),
    )


def kept_memory(s: Sizes, parts: list[Part]) -> Iterator[Part]:
    """Yield the freed tensors of steps that a process on a CPU keeps while nothing else needs them.

    The CPU kernels' allocator keeps a limited amount of large tensors; the C library keeps small ones
    (``ops/configure.py``).
    """
    if s.on_gpu:
        return
    freed = max(sum(p.num_bytes for p in parts if p.location == "gpu" and phase in p.when) for phase in STEP_PHASES)
    if s.has_kernels:
        kept = min(freed, KEPT_BYTES)
    else:
        widths = (s.config.model.dim, s.config.model.hidden)
        small = [s.kept_tokens * width * s.item < MAPPED_BYTES for width in widths]
        kept = freed * sum(small) // len(small)
    yield part("freed tensors kept for reuse", "gpu", (EVALUATION, CHECKPOINT), (kept, "B"))


def checkpoint_copy(s: Sizes) -> Part:
    """Return the copy of this rank's values that a checkpoint is written from while training continues."""
    run = s.config.run
    is_during_steps = any(0 < every < run.steps for every in (run.checkpoint_every, run.snapshot_every))
    phases = (TEACHER, TARGETS, LOSS, BACKWARD, CHECKPOINT) if is_during_steps else (CHECKPOINT,)
    num_bytes = 4 * saved_values(s) + _frozen_bytes(s) / s.world_size
    return part("copy for a checkpoint", "host", phases, (num_bytes, "B of this rank"))


def saved_values(s: Sizes) -> int:
    """Return the fp32 values of student and teacher in this rank's file of a checkpoint."""
    return (SAVED_BYTES * s.shard + SAVED_FROZEN_BYTES * s.frozen_shard) // 4


def _frozen_bytes(s: Sizes) -> int:
    """Return the bytes of the Gram teacher and the anchor in a checkpoint."""
    objective, model = s.config.objective, s.config.model
    numels = {name: math.prod(shape) for name, shape in backbone_shapes(model).items()}
    trained = sum(numel for name, numel in numels.items() if model.is_trained(name))
    return 4 * (objective.gram.is_active * sum(numels.values()) + objective.anchor.is_active * trained)


def disk_space(s: Sizes) -> Iterator[Part]:
    run = s.config.run
    if not run.checkpoint_every:
        # only the last step's
        kept = 1
    else:
        kept = min((run.keep_last or run.steps), max(1, run.steps // run.checkpoint_every)) + 1
        kept += run.steps // run.keep_every if run.keep_every else 0
    kept += s.config.evaluation.best is not None
    values = (saved_values(s) * s.world_size, "values")
    yield part("checkpoints", "disk", ALWAYS, (kept, "checkpoints"), values, (4, "B"))
    yield part("frozen networks in checkpoints", "disk", ALWAYS, (kept, "checkpoints"), (_frozen_bytes(s), "B"))
    snapshots = run.steps // run.snapshot_every if run.snapshot_every else 0
    values = ((s.shard + s.frozen_shard) * s.world_size, "values")
    yield part("snapshots", "disk", ALWAYS, (snapshots, "snapshots"), values, (4, "B"))
