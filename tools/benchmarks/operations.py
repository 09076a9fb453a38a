"""Kernels and bytes of the operations of a step on a GPU, counted on a CPU with tensors without values.

The regions of a step (a block's branches, the embedding, heads, prototype loss, targets) run with their real code under
a dispatch mode that records every ATen operation with the storages it reads and writes. The bytes are fitted as sums of
``coefficient x size``, for the planner (``streamtrain/planning/operations.json``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.recorder import Recorder, eager, trace
from streamtrain.config.model import HeadConfig, ModelConfig
from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch, Masks, normalise
from streamtrain.model import fp8, rope
from streamtrain.model.heads import Projection
from streamtrain.model.layers import Block
from streamtrain.model.layout import DropPath, Group, Layout, draw_drop_path
from streamtrain.model.rope import Rope
from streamtrain.model.vit import Embedding
from streamtrain.objective.gram import Negatives, gram_loss
from streamtrain.objective.prototypes import PlainWeight, prototype_cross_entropy
from streamtrain.objective.sinkhorn import Assignment, centered_softmax, sinkhorn, update_center
from streamtrain.objective.targets import TargetMaker, TeacherPrototypes
from streamtrain.ops.cpu.build import is_enabled, set_enabled
from streamtrain.planning.flops import micro_batch_crops
from streamtrain.planning.operation_counts import TABLE, Count, evaluate_entry, multiply_sizes
from streamtrain.planning.parts import BACKWARD, FORWARD, TARGETS, TEACHER
from streamtrain.training.ssl_model import LossWeights, SSLModel


@contextmanager
def gpu_paths() -> Iterator[None]:
    """Let fake CPU tensors take the paths of a GPU: no CPU kernels, fused attention, logits as fp32 results of bf16."""

    def matmul(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)

    was_enabled = is_enabled(torch.bfloat16)
    set_enabled(False)
    rope._cached_table.cache_clear()
    try:
        with (
            mock.patch("streamtrain.ops.attention.MAX_MATRIX_LENGTH", 0),
            mock.patch("streamtrain.ops.logits.matmul", matmul),
            mock.patch("streamtrain.ops.prototypes.matmul", matmul),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            yield
    finally:
        set_enabled(was_enabled)
        # it holds tensors without values
        rope._cached_table.cache_clear()


@contextmanager
def _bf16() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


Sizes = dict[str, int]
# one traced region: its key in the table, the sizes, and the kernels and bytes counted
Sample = tuple[str, Sizes, Count]


def _layout(images: tuple[int, ...]) -> Layout:
    """Return global crops of 14 x 14 patches and local crops of 6 x 6, with four registers."""
    grids = ((14, 14), (6, 6))[: len(images)]
    return Layout(tuple(Group(count, grid) for count, grid in zip(images, grids, strict=True)), 5)


def branches(dim: int, hidden: int, mlp: str, images: tuple[int, int], drop_rate: float) -> Iterator[Sample]:
    """Trace both branches of a block: in the teacher (global crops, no gradients) and in the student."""
    config = ModelConfig(dim=dim, num_heads=dim // 64, mlp=mlp, mlp_hidden=hidden)  # type: ignore[arg-type]
    with _bf16():
        block, positions = Block(config), Rope(config)
    for precision, linear in (("bf16", torch.nn.functional.linear), ("fp8", fp8.linear)):
        block.options = replace(block.options, implementation="reference", linear=linear)
        for where in ("teacher", "student", "student_drop"):
            layout = _layout(images[:1] if where == "teacher" else images)
            tokens = torch.empty(sum(layout.sizes()), dim, dtype=torch.bfloat16, requires_grad=True)
            tables = [positions.table(group.grid, tokens.device, tokens.dtype, None) for group in layout.groups]
            drop: DropPath | None = None
            if where == "student_drop":
                (drop,) = draw_drop_path(layout, 1, drop_rate, None, tokens.device)  # type: ignore[arg-type]
            kept = sum(drop.layout.sizes()) if drop else len(tokens)
            sizes = {"tokens": len(tokens), "kept": kept, "dim": dim, "hidden": hidden}
            for name, branch in (("attention", Block.attend), (f"mlp_{mlp}", _refine)):
                forward = partial(branch, block, tokens, layout, tables, drop)
                for direction, counts in trace(forward, where != "teacher").items():
                    for mode, count in counts.items():
                        yield f"{name}/{where}/{direction}/{mode}/{precision}", sizes, count


def _refine(block: Block, tokens: Tensor, layout: Layout, tables: Any, drop: DropPath | None) -> Tensor:
    return Block.refine(block, tokens, layout, drop, None)


def embedding(dim: int, patch: int, images: tuple[int, int]) -> Iterator[Sample]:
    """Trace the embedding of uint8 crops, with masks in the student."""
    config = ModelConfig(dim=dim, num_heads=dim // 64, patch_size=patch)
    with _bf16():
        module = Embedding(config)
    for where in ("teacher", "student"):
        layout = _layout(images[:1] if where == "teacher" else images)
        crops = [
            torch.empty(group.images, *(side * patch for side in group.grid), 3, dtype=torch.uint8)
            for group in layout.groups
        ]
        mask = torch.empty(images[0], 14 * 14, dtype=torch.bool)
        masks = [None] if where == "teacher" else [mask, None]

        def forward(crops: list[Tensor] = crops, masks: list[Any] = masks) -> Tensor:
            pixels = [normalise(each, (0.5,) * 3, (0.5,) * 3, torch.bfloat16) for each in crops]
            return module(pixels, masks)

        sizes = {"tokens": sum(layout.sizes()), "dim": dim, "pixels": sum(each.numel() for each in crops)}
        for direction, counts in trace(forward, where == "student").items():
            yield f"embedding/{where}/{direction}", sizes, counts["eager"]


def head(dim: int, hidden: int, bottleneck: int, layers: int, rows: int) -> Iterator[Sample]:
    """Trace a head's MLP in student and teacher."""
    with _bf16():
        module = Projection(dim, HeadConfig(hidden=hidden, bottleneck=bottleneck, layers=layers))
    features = torch.empty(rows, dim, dtype=torch.bfloat16, requires_grad=True)
    inner = {"dim": dim, "hidden": hidden, "bottleneck": bottleneck, "layers": layers, "inner": layers - 1}
    sizes = {"rows": rows, **inner}
    for direction, counts in trace(lambda: module(features)).items():
        yield f"head/student/{direction}", sizes, counts["eager"]
    yield "head/teacher/forward", sizes, _count(lambda: module(features))


def prototypes(rows: int, teacher_rows: int, prototypes: int, bottleneck: int, chunks: int) -> Iterator[Sample]:
    """Trace the prototype loss, with and without pairs of views, and the targets."""
    student, weight = (
        torch.empty(size, bottleneck, dtype=torch.bfloat16, requires_grad=True) for size in (rows, prototypes)
    )
    chunk, column = prototypes // chunks, torch.empty(prototypes)
    sizes = {
        "rows": rows, "teacher_rows": teacher_rows, "prototypes": prototypes, "bottleneck": bottleneck,
        "chunks": chunks,
    }  # fmt: skip
    for name, targets, pair in (
        ("global", teacher_rows, torch.empty(rows, 2, dtype=torch.int64)),
        ("patch", rows, None),
    ):
        teacher = torch.empty(targets, bottleneck, dtype=torch.bfloat16)
        assignment = Assignment(column, torch.empty(targets))
        frozen, row_weight = weight.detach(), torch.empty(rows)

        def loss(
            teacher: Tensor = teacher, assignment: Assignment = assignment, pair: Tensor | None = pair,
            frozen: Tensor = frozen, row_weight: Tensor = row_weight,
        ) -> Tensor:  # fmt: skip
            return prototype_cross_entropy(
                student, weight, teacher, frozen, assignment, pair, row_weight, 0.1, 0.05, chunk
            )

        for direction, counts in trace(loss).items():
            yield f"loss_{name}/{direction}", {**sizes, "teacher_rows": targets}, counts["eager"]
    features, frozen, valid = student.detach(), weight.detach(), torch.empty(rows, dtype=torch.bool)
    for iterations in (1, 2, 3):
        targets_of = partial(_sinkhorn, features, frozen, iterations, chunk, valid)
        yield "targets_sinkhorn", {**sizes, "later": iterations - 1}, _count(targets_of)

    def softmax() -> list[Tensor]:
        whole = centered_softmax(features, frozen, column, 0.05, chunk, valid)
        update_center(column, features, frozen, 0.9, valid)
        return [whole.column, whole.row]

    yield "targets_softmax", sizes, _count(softmax)


def _count(forward: Callable[[], Tensor | Sequence[Tensor]]) -> Count:
    """Return the eager counts of ``forward``, without gradients."""
    return trace(forward, with_backward=False)["forward"]["eager"]


def gram(images: int, patches: int, dim: int, chunks: int) -> Iterator[Sample]:
    """Trace the loss on similarities of all patches of an image."""
    student = torch.empty(images, patches, dim, dtype=torch.bfloat16, requires_grad=True)
    teacher, pairs = torch.empty_like(student, requires_grad=False), images * patches**2
    sizes = {"values": student.numel(), "pairs": pairs, "chunks": chunks}
    for negatives in NEGATIVES:
        loss = partial(gram_loss, student, teacher, None, "image", negatives, 4 * pairs // chunks)
        for direction, counts in trace(loss).items():
            yield f"gram_{negatives}/{direction}", sizes, counts["eager"]


def _sinkhorn(features: Tensor, weight: Tensor, iterations: int, chunk: int, valid: Tensor) -> list[Tensor]:
    assignment = sinkhorn(features, weight, 0.05, iterations, chunk, valid)
    return [assignment.column, assignment.row]


def trace_step(config: Config) -> dict[str, Count]:
    """Count a step of one micro-batch of the whole network, eager, by phase as in ``planning/time.py``."""
    crops, objective, batch_size = config.crops, config.objective, config.data.micro_batch
    images = crops.global_count * batch_size
    patches = crops.global_size.patches(config.model.patch_size)
    weights = LossWeights(gram=0.0)
    with gpu_paths():
        with _bf16():
            student, teacher = SSLModel(config), SSLModel(config)
        teacher.requires_grad_(False)
        _, _, rows = micro_batch_crops(config, config.crop_sizes[0])
        masks = Masks(
            torch.empty(images, patches, dtype=torch.bool), torch.empty(rows, dtype=torch.int64), torch.empty(rows)
        )
        pixels = [
            torch.empty(count * batch_size, *size, 3, dtype=torch.uint8)
            for count, size in ((crops.global_count, crops.global_size), (crops.local_count, crops.local_size))
        ]
        batch = Batch(np.arange(batch_size), pixels[0], pixels[1], masks)
        heads = (teacher.global_head, teacher.patch_head)
        prototypes = TeacherPrototypes(*(PlainWeight(head.prototypes.weight) if head else None for head in heads))
        for size in (crops.global_size, crops.local_size):
            # computed once in a run
            student.backbone.rope.table(size.grid(config.model.patch_size), masks.index.device, torch.bfloat16, None)
        with Recorder() as recorder:
            marks = [0]

            def mark() -> None:
                marks.append(len(recorder.operations))

            features = teacher.teacher_features(batch, weights)
            mark()
            (targets,) = TargetMaker(objective).make([features], prototypes, 0.05)
            mark()
            loss = student.student_losses(batch, targets, weights)["total"]
            mark()
            loss.backward()
            mark()
    phases = (TEACHER, TARGETS, FORWARD, BACKWARD)
    spans = zip(phases, pairwise(marks), strict=True)
    return {phase: eager(recorder.operations[start:stop]) for phase, (start, stop) in spans}


NEGATIVES: tuple[Negatives, ...] = ("keep", "drop", "drop_teacher")

# the sizes that kernels and bytes are proportional to, by the first part of a key
FEATURES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "attention": (("1",), ("tokens*dim", "kept*dim", "dim*dim")),
    "mlp_gelu": (("1",), ("tokens*dim", "kept*dim", "kept*hidden", "dim*hidden")),
    "mlp_swiglu": (("1",), ("tokens*dim", "kept*dim", "kept*hidden", "dim*hidden")),
    "embedding": (("1",), ("pixels", "tokens*dim")),
    "head": (("1", "layers"), ("rows*dim", "rows*hidden*inner", "rows*bottleneck")),
    "loss_global": (
        ("1", "chunks"),
        ("rows*prototypes", "teacher_rows*prototypes", "rows*bottleneck*chunks", "prototypes*bottleneck"),
    ),
    "loss_patch": (("1", "chunks"), ("rows*prototypes", "rows*bottleneck*chunks", "prototypes*bottleneck")),
    "targets_sinkhorn": (("1", "later", "chunks", "chunks*later"), ("rows*prototypes", "rows*prototypes*later")),
    "targets_softmax": (("1", "chunks"), ("rows*prototypes", "prototypes*bottleneck")),
    **{f"gram_{negatives}": (("1", "chunks"), ("values", "pairs")) for negatives in NEGATIVES},
}  # fmt: skip


def samples() -> Iterator[Sample]:
    """Trace all regions at several sizes."""
    with gpu_paths():
        for mlp in ("gelu", "swiglu"):
            for dim, ratio, images, rate in (
                (384, 4, (16, 64), 0.25), (768, 4, (16, 64), 0.5), (768, 3, (32, 64), 0.25), (384, 2, (16, 32), 0.5),
                (1024, 4, (64, 256), 0.25),
            ):  # fmt: skip
                yield from branches(dim, dim * ratio, mlp, images, rate)
        for dim, patch in ((384, 16), (768, 8), (768, 16)):
            yield from embedding(dim, patch, (16, 64))
        for sizes in ((384, 2048, 256, 3, 1000), (768, 1024, 256, 3, 1000), (384, 1024, 512, 2, 500)):
            yield from head(*sizes)
        for numbers in (
            (640, 128, 4096, 256, 4), (320, 128, 8192, 256, 8), (1000, 200, 4096, 128, 8), (640, 320, 8192, 512, 2),
        ):  # fmt: skip
            yield from prototypes(*numbers)
        for shape in ((32, 196, 384, 4), (64, 784, 384, 8), (32, 196, 1024, 2), (16, 1024, 1024, 8)):
            yield from gram(*shape)


def fit(traced: Sequence[tuple[Sizes, Count]], names: tuple[tuple[str, ...], tuple[str, ...]]) -> dict[str, Any]:
    """Return the coefficients of kernels and bytes, and the largest relative error of the bytes."""
    counted = {"kernels": [count.kernels for _, count in traced], "bytes": [count.num_bytes for _, count in traced]}
    entry: dict[str, Any] = {}
    for (kind, totals), features in zip(counted.items(), names, strict=True):
        if all(sizes.get("kept", 0) == sizes.get("tokens", 1) for sizes, _ in traced):
            features = tuple(feature for feature in features if feature != "tokens*dim")
        matrix = np.array(
            [[multiply_sizes(feature, sizes) for feature in features] for sizes, _ in traced], dtype=float
        )
        # relative errors count, since the totals differ by orders of magnitude
        weight = 1 / np.maximum(np.array(totals, dtype=float), 1.0)
        used = list(range(len(features)))
        solution = np.zeros(0)
        while len(used):
            solution, *_ = np.linalg.lstsq(matrix[:, used] * weight[:, None], totals * weight, rcond=None)
            negative = [index for index, c in zip(used, solution, strict=True) if c < 0]
            if not negative:
                break
            used = [index for index in used if index not in negative]
        entry[kind] = {features[i]: round(float(c), 2) for i, c in zip(used, solution, strict=True) if c >= 0.02}
    return entry


def table(traced: Sequence[Sample]) -> dict[str, Any]:
    """Return the fitted coefficients by region, pass, mode and precision."""
    regions: dict[str, list[tuple[Sizes, Count]]] = {}
    for key, sizes, count in traced:
        regions.setdefault(key, []).append((sizes, count))
    return {key: fit(counted, FEATURES[key.partition("/")[0]]) for key, counted in sorted(regions.items())}


def largest_error(coefficients: dict[str, Any], traced: Sequence[Sample]) -> float:
    """Return the largest relative error of the fitted kernels and bytes."""
    errors = []
    for key, sizes, count in traced:
        for fitted, total in zip(evaluate_entry(coefficients[key], sizes), count, strict=True):
            errors.append(abs(fitted - total) / max(1, total))
    return max(errors)


def run(write: bool) -> dict[str, Any]:
    """Fit the table, write it if requested, and return how well it fits and whether it is current."""
    traced = list(samples())
    coefficients = table(traced)
    text = json.dumps(coefficients, separators=(", ", ": ")).replace("}}, ", "}},\n") + "\n"
    is_current = TABLE.exists() and TABLE.read_text() == text
    if write:
        TABLE.write_text(text)
    return {
        "entries": len(coefficients),
        "largest_error": largest_error(coefficients, traced),
        "is_current": is_current,
    }
