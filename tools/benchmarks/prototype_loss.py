"""Peak memory and time of the fused prototype loss with its Sinkhorn targets, against plain PyTorch."""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.process_usage import peak_rss_since, reset_peak_rss, run_in_fresh_process
from streamtrain.objective.prototypes import prototype_cross_entropy
from streamtrain.objective.sinkhorn import sinkhorn
from streamtrain.ops.chunks import chunk_rows

STUDENT_TEMPERATURE, TEACHER_TEMPERATURE, ITERATIONS = 0.1, 0.07, 3
PARTS = ("loss", "features", "weight")


def run(rows: int, prototypes: int, dim: int, chunk_bytes: int, rounds: int) -> dict[str, Any]:
    """Measure both forms interleaved, each in a fresh process; report the minimum time and peak of each."""
    with tempfile.TemporaryDirectory() as folder:
        shape = (rows, prototypes, dim)
        fused, plain = [], []
        for _ in range(rounds):
            fused.append(run_in_fresh_process(measure, Path(folder) / "fused", *shape, chunk_bytes))
            plain.append(run_in_fresh_process(measure, Path(folder) / "plain", *shape, 0))
        errors = {part: _error(Path(folder), part) for part in PARTS}
    best = {name: [min(each[key] for each in runs) for key in ("peak_bytes", "seconds", "cpu_seconds")]
            for name, runs in (("fused", fused), ("plain", plain))}  # fmt: skip
    return {
        "fused_peak_bytes": int(best["fused"][0]),
        "plain_peak_bytes": int(best["plain"][0]),
        "peak_ratio": best["fused"][0] / best["plain"][0],
        "fused_seconds": best["fused"][1],
        "plain_seconds": best["plain"][1],
        "time_ratio": best["fused"][1] / best["plain"][1],
        # CPU time depends less on other load
        "cpu_time_ratio": best["fused"][2] / best["plain"][2],
        "max_relative_error": max(errors.values()),
        **{f"{part}_relative_error": error for part, error in errors.items()},
        "threads": torch.get_num_threads(),
    }


def measure(path: Path, rows: int, prototypes: int, dim: int, chunk_bytes: int) -> dict[str, float]:
    """Compute loss and both gradients once, after a small warm-up, and save them to ``PATH.PART.npy``.

    ``chunk_bytes`` 0 selects the plain form. The peak is counted above the memory of the inputs.
    """
    small = _inputs(64, 256, dim)
    _step(*small, chunk_bytes)
    inputs = _inputs(rows, prototypes, dim)
    baseline = reset_peak_rss()
    started, cpu = time.perf_counter(), time.process_time()
    loss = _step(*inputs, chunk_bytes)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = peak_rss_since(baseline)
    for part, tensor in zip(PARTS, (loss, inputs[0].grad, inputs[1].grad), strict=True):
        assert tensor is not None
        np.save(f"{path}.{part}.npy", tensor.detach().numpy())
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak}


def _inputs(rows: int, prototypes: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return student features and prototypes (both require grad), and similar ones for the teacher."""
    generator = torch.Generator().manual_seed(0)

    def unit(count: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=-1)

    features, weight = unit(rows), unit(prototypes)
    teacher_features = torch.nn.functional.normalize(features + 0.3 * unit(rows), dim=-1)
    return features.requires_grad_(), weight.requires_grad_(), teacher_features, weight.detach().clone()


def _step(features: Tensor, weight: Tensor, teacher_features: Tensor, teacher_weight: Tensor, chunk: int) -> Tensor:
    form = _plain if not chunk else _fused
    loss = form(features, weight, teacher_features, teacher_weight, chunk)
    loss.backward()
    return loss


def _fused(features: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, chunk_bytes: int) -> Tensor:
    rows, prototypes = len(features), len(weight)
    chunk = chunk_rows(chunk_bytes, rows, prototypes)
    assignment = sinkhorn(teacher, teacher_weight, TEACHER_TEMPERATURE, ITERATIONS, chunk)
    return prototype_cross_entropy(
        features, weight, teacher, teacher_weight, assignment, None, torch.full((rows,), 1 / rows),
        STUDENT_TEMPERATURE, TEACHER_TEMPERATURE, chunk_rows(chunk_bytes, 2 * rows, prototypes),
    )  # fmt: skip


def _plain(features: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, _: int) -> Tensor:
    """Compute whole logits and targets as usually written (Caron et al. 2020, 2021), partly in place."""
    with torch.no_grad():
        rows, prototypes = len(teacher), len(teacher_weight)
        target = (teacher @ teacher_weight.T).div_(TEACHER_TEMPERATURE).exp_()
        target /= target.sum()
        for _iteration in range(ITERATIONS):
            target /= target.sum(0, keepdim=True) * prototypes
            target /= target.sum(1, keepdim=True) * rows
        target *= rows
    log_probability = torch.log_softmax(features @ weight.T / STUDENT_TEMPERATURE, dim=-1)
    return -(target * log_probability).sum(-1).mean()


def _error(folder: Path, part: str) -> float:
    """Return the relative L2 distance of the fused result from the plain one."""
    fused, plain = (np.load(folder / f"{name}.{part}.npy", mmap_mode="r") for name in ("fused", "plain"))
    distance, size = 0.0, 0.0
    for start in range(0, max(1, len(np.atleast_1d(plain))), 4096):
        a, b = (np.atleast_1d(each)[start : start + 4096].astype(np.float64) for each in (fused, plain))
        distance, size = distance + float(np.square(a - b).sum()), size + float(np.square(b).sum())
    return math.sqrt(distance / size)
