"""Buffers of a micro-batch: activations, crops and features."""

from __future__ import annotations

from collections.abc import Iterator

from streamtrain.config.model import ModelConfig
from streamtrain.planning.parts import ALWAYS, BACKWARD, EVALUATION, LOSS, TARGETS, TEACHER, Location, Part, part
from streamtrain.planning.sizes import CPU_KERNELS, Sizes


def activations(s: Sizes) -> Iterator[Part]:
    config, model, through, item = s.config, s.config.model, (LOSS, BACKWARD), (s.item, "B")
    yield from (_tiled_blocks if s.implementation == CPU_KERNELS else _blocks)(s)
    patches = s.images[0] * (s.global_tokens - 1) + s.images[1] * (s.local_tokens - 1)
    # kept for the gradient of the embedding
    if model.is_trained("embedding.projection.weight"):
        values = (3 * model.channels * model.patch_size**2, "values")
        yield part("embedded pixels", "gpu", through, (patches, "patches"), values, item)
    for name, head, rows, _ in s.heads:
        per_row = 2 * model.dim + 2 * head.hidden * (head.layers - 1) + 6 * head.bottleneck
        yield part(f"{name} head", "gpu", through, (rows, "rows"), (per_row, "values"), item)

    # the teacher needs the residual stream, and one block's activations for one chunk of images
    stream_tokens = (s.images[0] * s.global_tokens, "tokens")
    copies = 2 if config.teacher.chunk else 3
    phases = (EVALUATION,) if s.feature_teacher else (TEACHER, EVALUATION)
    yield part("teacher's stream", "gpu", phases, stream_tokens, (copies * model.dim, "values"), item)
    yield from _feature_distillation(s)

    # of the step, ready for the next one, and being prepared
    batches = s.accumulation + config.batches_ahead(s.world_size, on_gpu=s.on_gpu) + 1
    yield part("crops of the step", "gpu", ALWAYS, (batches, "micro-batches"), (config.micro_batch_bytes, "B"))
    if config.objective.has_gram_matrices:
        similarities = (s.images[0] * (s.global_tokens - 1) ** 2, "patch pairs")
        yield part("Gram matrices and their gradient", "gpu", through, similarities, (4, "copies"), (4, "B"))
    for name, head, _, rows in s.heads:
        # Sinkhorn needs the rows of all micro-batches
        kept_rows = (s.accumulation * rows, "rows")
        yield part(f"{name} teacher features", "gpu", ALWAYS, kept_rows, (head.bottleneck, "values"), item)
        yield part(f"{name} features joined", "gpu", TARGETS, kept_rows, (head.bottleneck, "values"), item)
    if config.objective.patch_loss.kind != "ibot" and not s.feature_teacher:
        masked = (s.accumulation * s.masked_rows, "rows")
        yield part("patch teacher features", "gpu", ALWAYS, masked, (model.dim, "values"), item)


def _feature_distillation(s: Sizes) -> Iterator[Part]:
    """Yield the activations of a feature teacher, its features, and the projected features; none without one."""
    if s.feature_teacher is None:
        return
    teacher, tokens = s.feature_teacher
    item, width = (s.item, "B"), (teacher.dim, "values")
    copies = 2 if s.config.teacher.chunk else 3
    yield part("feature teacher's stream", "gpu", TEACHER, (tokens, "tokens"), (copies * teacher.dim, "values"), item)
    if s.implementation != CPU_KERNELS:
        chunk = min(s.config.teacher.chunk or s.images[0], s.images[0]) * tokens // s.images[0]
        peak = (_teacher_peak(teacher), "values")
        yield part("feature teacher's block", "gpu", TEACHER, (chunk, "tokens of a chunk"), peak, item)
    if teacher.patch_size != s.config.model.patch_size:
        # fp32 images of patches, before and after
        resized = (tokens + s.masked_rows, "patches")
        yield part("resized patches", "gpu", TEACHER, resized, width, (4, "B"))
    kept = (s.accumulation * (s.images[0] + s.masked_rows), "rows")
    yield part("teacher features", "gpu", ALWAYS, kept, width, item)
    rows = (sum(s.images) + s.masked_rows, "rows")
    layers, hidden = s.config.teacher.projector_layers, s.config.teacher.projector_hidden or teacher.dim
    per_row = s.config.model.dim + 2 * hidden * (layers - 1) + teacher.dim
    yield part("projector", "gpu", (LOSS, BACKWARD), rows, (per_row, "values"), item)
    # both sides in fp32 with their normalised copies, and the gradient
    yield part("feature loss", "gpu", (LOSS, BACKWARD), rows, (5 * teacher.dim, "values"), (4, "B"))


def _teacher_peak(model: ModelConfig) -> int:
    """Return the values per token of a block of a network without gradients."""
    return max(8 * model.dim, 2 * model.dim + (4 if model.mlp == "swiglu" else 2) * model.hidden)


def _branches(s: Sizes) -> tuple[float, float, float]:
    """Return the values per token that autograd saves in a block: of attention, of the MLP, of the residual stream.

    The first two are per token that drop-path keeps, the last is per token.
    """
    model = s.config.model
    dropped = model.drop_path > 0
    # kept rows (if drop-path selects some), norm, q k v, rotated q k, output, its packed copy, projection
    attention = model.dim * (dropped + 1 + 3 + 2 + 1 + 1 + 1)
    hidden = 4 * model.hidden if model.mlp == "swiglu" else 2 * model.hidden
    mlp = model.dim * (dropped + 1 + 1) + hidden
    # the input of each adapter's second matmul
    attention += sum(target != "mlp" for target in model.lora.targets) * model.lora.rank
    mlp += 2 * model.lora.rank * ("mlp" in model.lora.targets)
    return attention, mlp, 2 * model.dim


def _tiled_blocks(s: Sizes) -> Iterator[Part]:
    model, engine = s.config.model, s.config.engine
    tokens, item = (s.tokens, "tokens"), (s.item, "B")
    branches, width, values = (2 * model.depth - 1, "branches"), (model.dim, "values"), (s.block, "values")
    # only inputs of branches are saved; the backward recomputes everything else
    yield part("kept between branches", "gpu", (LOSS, BACKWARD), branches, tokens, width, item)
    read = sum(s.images) + (s.images[0] * s.global_tokens if s.config.objective.compares_all_patches else s.masked_rows)
    yield part("the last branch's rows", "gpu", (LOSS, BACKWARD), (read, "rows"), width, item)
    yield part("gradients of the stream", "gpu", BACKWARD, (2, "copies"), tokens, width, item)
    yield part("a block's values laid out", "gpu", ALWAYS, (2, "directions"), values, item)
    threads = (engine.cpu_threads or s.cores, "threads")
    yield part("a block's gradient in fp32", "gpu", ALWAYS, threads, values, (4, "B"))


def _blocks(s: Sizes) -> Iterator[Part]:
    model, engine = s.config.model, s.config.engine
    attention, mlp, stream = _branches(s)
    item = (s.item, "B")
    kept, tokens = (s.kept_tokens, "kept tokens"), (s.tokens, "tokens")
    depth = (len(model.trained_blocks), "blocks")
    through = (LOSS, BACKWARD)
    groups = engine.view_groups
    if engine.checkpointing == "block":
        location: Location = "host" if engine.offload_checkpoints and s.on_gpu else "gpu"
        yield part("kept between blocks", location, through, depth, tokens, (model.dim, "values"), item)
        if location == "host":
            # beside the one in use
            yield part("activations being copied", "gpu", through, (2, "copies"), tokens, (model.dim, "values"), item)
        inside = (attention + mlp) if groups == 1 else max(attention, mlp) / groups + 4 * model.dim
        yield part("recomputed block", "gpu", BACKWARD, kept, (inside, "values"), item)
        yield part("recomputed stream", "gpu", BACKWARD, tokens, (stream, "values"), item)
    else:
        # a recomputed MLP saves its input and its output
        name, saved = "kept branches", attention + mlp
        if engine.checkpointing == "selective":
            name, saved = "kept attention branches", attention + (2 if model.drop_path else 1) * model.dim
        yield part(name, "gpu", through, depth, kept, (saved, "values"), item)
        yield part("kept stream", "gpu", through, depth, tokens, (stream, "values"), item)
    if engine.checkpointing == "selective":
        yield part("recomputed MLP", "gpu", BACKWARD, kept, (mlp / groups, "values"), item)
    # gradients of the MLP's widest activations, and of the stream
    wide = (3 if model.mlp == "swiglu" else 2) * model.hidden / (groups if engine.checkpointing != "none" else 1)
    yield part("gradients of activations", "gpu", BACKWARD, kept, (wide + 2 * model.dim, "values"), item)
    if engine.fp8:
        # the widest operand of an FP8 matmul; without a compiled kernel also its fp32 copy
        widest = ((2 if model.mlp == "swiglu" else 1) * model.hidden, "values")
        size = (1 if engine.compiles(on_gpu=s.on_gpu) else 5, "B")
        yield part("a factor in 8 bits", "gpu", through, kept, widest, size)
    chunk = (min(s.config.teacher.chunk or s.images[0], s.images[0]) * s.global_tokens, "tokens of a chunk")
    phases = (EVALUATION,) if s.feature_teacher else (TEACHER, EVALUATION)
    yield part("teacher's block", "gpu", phases, chunk, (_teacher_peak(model), "values"), item)
