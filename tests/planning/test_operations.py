"""The planner's table of kernels and bytes agrees with the present code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from streamtrain.config.load import load_config
from streamtrain.planning.hardware import DEFAULT_HARDWARE
from streamtrain.planning.operation_counts import evaluate_counts
from streamtrain.planning.time import predict

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))


def test_table_is_current() -> None:
    """If this fails, run ``python tools/bench.py operations --write``."""
    from benchmarks import operations

    with operations.gpu_paths():
        traced = [
            *operations.branches(512, 2048, "gelu", (16, 64), 0.25),
            *operations.branches(512, 1024, "swiglu", (16, 64), 0.5),
            *operations.embedding(512, 16, (16, 64)),
            *operations.head(512, 1024, 256, 3, 800),
            *operations.prototypes(800, 160, 4096, 256, 4),
            *operations.gram(24, 400, 512, 4),
        ]
    for key, sizes, count in traced:
        kernels, num_bytes = evaluate_counts(key, **sizes)
        assert kernels == count.kernels, key
        assert num_bytes == pytest.approx(count.num_bytes, rel=0.06), key


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("engine.checkpointing=none", "model.drop_path=0.0"),
        ("engine.checkpointing=selective", "model.mlp=swiglu"),
    ],
)
def test_regions_add_up_to_the_operations_of_the_whole_network(overrides: tuple[str, ...]) -> None:
    from benchmarks import operations

    # chunks as on the CPU that is traced
    eager = ("model.depth=3", "engine.compile=off", "engine.dtype=bf16", "objective.chunk_bytes=8MiB")
    config = load_config("vits16.yaml", (*eager, *overrides))
    time = predict(config, 1, DEFAULT_HARDWARE)
    bandwidth = 1 / DEFAULT_HARDWARE.memory_seconds(1)
    for phase, count in operations.trace_step(config).items():
        # storing gradients is the engine's work
        regions = [region for region in time.regions if region.phase == phase and region.name != "gradients"]
        assert sum(region.kernels for region in regions) == pytest.approx(count.kernels, rel=0.05), phase
        assert sum(region.memory for region in regions) * bandwidth == pytest.approx(count.num_bytes, rel=0.05), phase


def test_a_compiled_branch_moves_fewer_bytes_in_fewer_kernels() -> None:
    sizes = {"tokens": 8000, "kept": 6000, "dim": 1024, "hidden": 4096}
    for branch in ("attention", "mlp_gelu", "mlp_swiglu"):
        for direction in ("forward", "backward"):
            eager, compiled = (
                evaluate_counts(f"{branch}/student_drop/{direction}/{mode}/bf16", **sizes)
                for mode in ("eager", "compiled")
            )
            assert compiled.kernels < eager.kernels and compiled.num_bytes < eager.num_bytes
