"""The plan equals the allocated model states and follows settings; ``fit`` finds settings that fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import run_ranks

from streamtrain.config.load import build, load_config
from streamtrain.config.tree import Config
from streamtrain.planning.fitting import fit, remedies
from streamtrain.planning.host import COPY_SHARE
from streamtrain.planning.machine import Machine
from streamtrain.planning.memory import plan
from streamtrain.planning.parts import PHASES

SCRIPT = Path(__file__).with_name("state_bytes.py")


@pytest.mark.parametrize(
    ("world_size", "dtype", "moments", "lora"),
    [
        (1, "bf16", "8bit", {}),
        (2, "bf16", "device", {}),
        (3, "fp32", "disk", {}),
        (1, "fp32", "device", {"rank": 4, "targets": ["qkv", "mlp"], "blocks": 1, "free_blocks": 1}),
        (2, "bf16", "8bit", {"rank": 4}),
    ],
)
def test_model_states_are_planned_to_the_byte(
    world_size: int, dtype: str, moments: str, lora: dict[str, object], tmp_path: Path
) -> None:
    results = run_ranks([SCRIPT, dtype, moments, tmp_path, json.dumps(lora)], world_size)
    assert [code for code, _, _ in results] == [0] * world_size, results[0][2][-2000:]
    reports = [json.loads(out.splitlines()[-1]) for _, out, _ in results]
    planned = reports[0].pop("planned")
    for report in reports:
        report.pop("planned", None)
        assert report == {name: num_bytes for name, num_bytes in planned.items() if name in report}
        assert sum(report.values()) > 100_000


def giant(*overrides: str) -> Config:
    return load_config("giant.yaml", overrides)


def test_plan_follows_memory_settings() -> None:
    base = plan(giant(), 8)
    assert plan(giant(), 16).gpu_bytes < base.gpu_bytes
    assert plan(giant("data.micro_batch=32"), 8).gpu_bytes > base.gpu_bytes
    assert plan(giant("engine.checkpointing=none"), 8).gpu_bytes > base.gpu_bytes
    assert plan(giant("engine.view_groups=4"), 8).gpu_bytes < base.gpu_bytes
    assert plan(giant("teacher.chunk=4"), 8).at("teacher pass") < base.at("teacher pass")
    for moved in ("engine.moments=host", "engine.moments=disk", "engine.moments=8bit", "teacher.average=host"):
        assert plan(giant(moved), 8).gpu_bytes < base.gpu_bytes
    half = plan(giant("engine.moments=host", "engine.moments_ratio=0.5"), 8)
    full = plan(giant("engine.moments=host"), 8)
    assert full.gpu_bytes < half.gpu_bytes < base.gpu_bytes
    assert full.host_bytes > half.host_bytes > base.host_bytes


def test_cpu_kernels_save_only_the_inputs_of_branches() -> None:
    overrides = ("data.micro_batch=16", "data.global_batch=16", "engine.cpu_threads=2")
    kept = {}
    others = ("engine.cpu_kernels=false", "engine.compile=on", "engine.fp8=true", "model.dim=360")
    for extra in ("engine.cpu_kernels=true", *others):
        config = load_config("vits16.yaml", [*overrides, "model.preset=null", extra])
        for bf16 in (True, False):
            parts = {part.name: part for part in plan(config, 1, on_gpu=False, bf16=bf16).parts}
            kept[extra, bf16] = parts.get("kept between branches")
            assert (kept[extra, bf16] is None) == ("recomputed block" in parts)
            # a machine without a compiler or without the instructions
            without = {part.name for part in plan(config, 1, on_gpu=False, bf16=bf16, supported="reference").parts}
            assert "recomputed block" in without and "kept between branches" not in without
    tokens = 16 * (2 * (5 + 14**2) + 8 * (5 + 6**2))
    for bf16, item in ((True, 2), (False, 4)):
        part = kept.pop(("engine.cpu_kernels=true", bf16))
        assert part is not None and part.num_bytes == (12 * 2 - 1) * tokens * 384 * item
    assert not any(kept.values())


def test_recomputation_trades_memory_for_flops() -> None:
    modes = [plan(giant(f"engine.checkpointing={mode}"), 8) for mode in ("none", "selective", "block")]
    assert modes[0].gpu_bytes > modes[1].gpu_bytes > modes[2].gpu_bytes
    assert modes[0].flops_per_step < modes[1].flops_per_step < modes[2].flops_per_step


def test_flops_of_a_dense_step() -> None:
    """About 6 FLOPs per parameter and token for the student and 2 for the teacher, without most of the last MLP."""
    config = giant("model.drop_path=0.0", "engine.checkpointing=none", "data.global_batch=128")
    planned = plan(config, 8)
    student, teacher = 128 * (2 * 261 + 8 * 54), 128 * 2 * 261
    expected = 6.7e9 * (1 - 2 / 3 / 40) * (6 * student + 2 * teacher)
    assert 1.0 < planned.flops_per_step / expected < 1.25
    # the student twice and the teacher once, in bf16, without a rank's own eighth
    assert planned.all_gather_bytes_per_step == pytest.approx(3 * 7.028e9 * 2 * 7 / 8, rel=0.03)
    assert plan(config, 1).all_gather_bytes_per_step == 0


GB = 10**9


def test_giant_recipes_fit_their_gpus() -> None:
    eight, one = Machine(8, gpu_memory=80 * GB), Machine(1, gpu_memory=141 * GB, host_memory=120 * GB)
    for recipe, machine in (("giant.yaml", eight), ("giant_8gpu.yaml", eight), ("giant_1gpu.yaml", one)):
        assert machine.fits(machine.plan(load_config(recipe))), recipe
    assert not one.fits(one.plan(giant()))


def test_fit_finds_settings_or_none() -> None:
    machine = Machine(1, gpu_memory=141 * GB, host_memory=128 * GB)
    result = fit(giant(), machine, None)
    assert result is not None
    config, planned, estimate, overrides = result
    assert machine.fits(planned)
    assert config == giant(*overrides) and planned == machine.plan(giant(*overrides))
    assert estimate == machine.estimate_step(config, planned)
    # with little host memory only 8-bit moments or files fit
    squeezed = fit(giant(), replace(machine, host_memory=40 * GB), 4)
    assert squeezed is not None and squeezed.config.data.micro_batch == 4
    assert squeezed.config.engine.moments in ("disk", "8bit")
    assert fit(giant(), replace(machine, gpu_memory=40 * GB), None) is None


def test_fit_on_a_cpu_counts_one_memory() -> None:
    config = load_config("vitb16.yaml", ("engine.checkpointing=none",))
    roomy = Machine(1, on_gpu=False, supported="reference", host_memory=64 * GB)
    needed = roomy.plan(config).host_bytes
    assert roomy.fits(roomy.plan(config)) and roomy.plan(config).gpu_bytes == 0
    result = fit(config, replace(roomy, host_memory=needed // 2), None)
    assert result is not None and result.planned.host_bytes <= needed // 2
    assert not {"teacher.average=host", "engine.moments=host"} & set(result.overrides)


@pytest.mark.parametrize(
    ("recipe", "settings", "machine", "expected"),
    [
        ("vitl16.yaml", ("data.micro_batch=64", "engine.checkpointing=none"), Machine(1, gpu_memory=24 * GB),
         "engine.checkpointing=block"),
        ("giant.yaml", (), Machine(4, gpu_memory=24 * GB), "--gpus 16"),
        ("vits16.yaml", (), Machine(1, on_gpu=False, host_memory=3_100_000_000), "engine.moments=disk"),
    ],
)  # fmt: skip
def test_each_remedy_is_one_change_with_which_the_run_fits(
    recipe: str, settings: tuple[str, ...], machine: Machine, expected: str
) -> None:
    config = load_config(recipe, settings)
    assert not machine.fits(machine.plan(config))
    found = remedies(config, machine)
    assert expected in [remedy.change for remedy in found]
    for remedy in found:
        changed, other = config, machine
        if remedy.change.startswith("--gpus "):
            other = replace(machine, ranks=int(remedy.change.split()[1]))
        else:
            changed = load_config(recipe, (*settings, *remedy.change.split()))
        assert other.plan(changed) == remedy.planned and other.fits(remedy.planned), remedy.change
    assert [remedy.seconds for remedy in found] == sorted(remedy.seconds for remedy in found)


def test_the_copy_of_a_checkpoint_is_counted_where_the_writer_makes_one() -> None:
    # the evaluation needs host memory at another time
    config = load_config("vits16.yaml", ("evaluation.every=0",))
    for on_gpu in (True, False):
        planned = plan(config, 1, on_gpu=on_gpu)
        (copy,) = (part for part in planned.parts if part.name == "copy for a checkpoint")
        assert copy.location == "host" and copy.num_bytes == 16 * planned.num_parameters
        # during the next step, unless only the last step is saved
        assert "backward" in copy.when
        at_end = plan(load_config("vits16.yaml", ("evaluation.every=0", "run.checkpoint_every=0")), 1, on_gpu=on_gpu)
        assert {p.name: p.when for p in at_end.parts}["copy for a checkpoint"] == ("last checkpoint",)
        without = plan(
            load_config("vits16.yaml", ("evaluation.every=0", "run.save_in_background=false")), 1, on_gpu=on_gpu
        )
        # less than its bytes if the peak is in another phase without it
        assert 0.95 * copy.num_bytes < planned.host_bytes - without.host_bytes <= copy.num_bytes
        # as the writer decides: it needs a share of the memory that the steps leave
        enough = without.host_bytes + int(copy.num_bytes / COPY_SHARE)
        for memory, expected in ((enough + 10, planned), (enough - 10, without)):
            assert plan(config, 1, on_gpu=on_gpu, host_memory=memory).host_bytes == expected.host_bytes


def test_every_part_has_size_arithmetic_and_phases() -> None:
    planned = plan(giant(), 8)
    for part in planned.parts:
        assert part.num_bytes > 0 and part.arithmetic and set(part.when) <= {"always", *PHASES}
    assert planned.gpu_bytes == max(planned.at(phase) for phase in PHASES)
    tiny = plan(build({"data": {"micro_batch": 2}}), 1, on_gpu=False, bf16=False)
    assert not [part for part in tiny.parts if "context" in part.name]
