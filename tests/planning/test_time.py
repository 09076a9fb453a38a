"""The predicted time of a step on GPUs: published runs, and how it depends on the settings."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from streamtrain.config.load import load_config
from streamtrain.planning.flops import block_flops, gram_flops, micro_batch_crops, step_flops
from streamtrain.planning.hardware import DEFAULT_HARDWARE, DISK_RATE, HOST_RATE, Hardware
from streamtrain.planning.machine import Machine
from streamtrain.planning.memory import STATES, Transfers
from streamtrain.planning.parts import BACKWARD, FORWARD
from streamtrain.planning.peak import GPUS, gpu_of_device, gpu_of_option
from streamtrain.planning.time import StepTime, mfu, predict, smallest_hiding_micro_batch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))


def predicted(*overrides: str, ranks: int = 8, hardware: Hardware = DEFAULT_HARDWARE) -> StepTime:
    return predict(load_config("vitl16.yaml", overrides, ranks), ranks, hardware)


def test_predictions_of_published_runs_are_within_30_percent() -> None:
    from benchmarks.predicted_time import PUBLISHED

    # the duration in DINOv3's README; docs/performance.md discusses it
    unexplained = ("DINOv3 ViT-L/16", "h100")
    for run in PUBLISHED:
        is_close = abs(run.error()) < 0.3
        assert is_close == ((run.name, run.gpu) != unexplained), (run.name, run.gpu, run.error())


@pytest.mark.parametrize("name", ["gpus", "causes", "published", "savings"])
def test_stored_predictions_are_current(name: str) -> None:
    """If this fails, copy the output of ``python tools/bench.py predicted`` into the result file."""
    from benchmarks.predicted_time import published_table, recipe_table, savings_table

    table = {"published": published_table, "savings": savings_table}.get(name, recipe_table)
    heads, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table().splitlines())
    stored = json.loads((ROOT / "benchmarks" / "results" / f"predicted_{name}.json").read_text())
    columns = [heads.index(next(head for head in heads if head.partition(" (")[0] == column["name"]))
               for column in stored["columns"]]  # fmt: skip
    predicted = [[row[column] for column in columns] for row in rows]
    assert [[_as_text(value) for value in row] for row in stored["rows"]] == [
        [_as_text(value) for value in row] for row in predicted
    ]


def _as_text(value: object) -> str:
    """Return a cell without the decimals and the sign that tables of other programs add: 104.0 and +13."""
    text = str(value).removeprefix("+")
    return text.removesuffix(".0")


@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
def test_matmuls_take_the_flops_of_the_step(checkpointing: str) -> None:
    config = load_config("vitl16.yaml", ("data.global_batch=null", f"engine.checkpointing={checkpointing}"), 1)
    # so slow that no matmul is bound by memory
    rate = 1e9
    time = predict(config, 1, replace(DEFAULT_HARDWARE, flops=rate))
    # the scores of attention have a rate of their own
    full, local, _ = micro_batch_crops(config, config.crop_sizes[0])
    of_student = sum(block_flops(config.model, crops, crops.kept)[1] for crops in (full, local))
    passes = 4 if checkpointing == "block" else 3
    scores = config.model.depth * (block_flops(config.model, full, full.images)[1] + passes * of_student)
    matmuls = sum(region.matmul for region in time.regions) * rate
    assert matmuls == pytest.approx(step_flops(config, 1).executed - scores, rel=0.02)


def test_gram_loss_takes_its_flops_in_fp32() -> None:
    words = ("data.micro_batch=4096", "data.global_batch=null", "objective.gram.weight.peak=1", "engine.compile=off")
    for level in ("image", "batch"):
        config = load_config("vits16.yaml", (*words, f"objective.gram.level={level}"), 1)
        time = predict(config, 1, DEFAULT_HARDWARE)
        full, _, _ = micro_batch_crops(config, config.crop_sizes[0])
        forward, backward = (region for region in time.regions if region.name == "gram loss")
        flops = gram_flops(config, full, config.objective.gram.level)
        assert forward.matmul > flops / DEFAULT_HARDWARE.gpu.fp32 and backward.matmul == 0
        assert forward.memory > 0 and backward.memory > 0
        # the matmuls of the similarities count in it
        assert 0 < mfu(config, 1, DEFAULT_HARDWARE, time.seconds) < 0.2
    without = predict(load_config("vits16.yaml", words[:2], 1), 1, DEFAULT_HARDWARE)
    assert not any(region.name == "gram loss" for region in without.regions)


def test_parts_add_up_and_the_largest_is_the_bound() -> None:
    time = predicted()
    assert sum(time.parts.values()) == pytest.approx(time.seconds)
    assert time.parts[time.bound] == max(time.parts.values())
    config = load_config("vitl16.yaml", (), 8)
    assert Machine(8).estimate_step(config, Machine(8).plan(config)).seconds == pytest.approx(time.seconds)
    assert 0 < mfu(config, 8, DEFAULT_HARDWARE, time.seconds) < 1


def test_settings_change_the_time() -> None:
    time = predicted()
    assert predicted("engine.compile=off").seconds > time.seconds > predicted("engine.fp8=true").seconds
    assert predicted("engine.view_groups=4").seconds > time.seconds > predicted("engine.checkpointing=none").seconds
    assert predicted("model.drop_path=0.0").seconds > time.seconds
    assert predicted("objective.chunk_bytes=256MiB").parts["launch"] < time.parts["launch"]
    # the same images in more micro-batches
    assert predicted("data.micro_batch=8").seconds > time.seconds
    for gpu in GPUS:
        assert predicted(hardware=Hardware(gpu)).seconds > 0.5 * time.seconds, gpu.name


def test_network_is_hidden_from_a_micro_batch() -> None:
    slow = replace(DEFAULT_HARDWARE, network=1e9)
    config = load_config("giant.yaml", (), 256)
    assert predict(config, 256, slow).bound == "network"
    fast, late = (smallest_hiding_micro_batch(config, 256, hardware) for hardware in (DEFAULT_HARDWARE, slow))
    assert fast is not None and late is not None and 1 < fast < late
    # one rank has no network, and a single live block no overlap
    assert predicted("data.global_batch=null", ranks=1).parts["network"] == 0
    assert predicted("engine.live_blocks=1").parts["network"] > predicted().parts["network"] == 0
    # the targets wait for all-reduces, which nothing hides
    assert predicted().parts["targets' all-reduces"] > 0


def test_loader_and_offloading_bound_the_step() -> None:
    slow = predicted(hardware=replace(DEFAULT_HARDWARE, loader=100.0))
    assert slow.bound == "loader" and slow.seconds == pytest.approx(2048 / 100)
    # the step waits for the loader, although its own work takes longer than the wait
    quick = predict(load_config("quickstart.yaml", (), 8), 8, DEFAULT_HARDWARE)
    assert quick.bound == "loader" and quick.parts["loader"] < quick.parts["launch"]


def test_copies_to_the_host_take_one_direction_and_those_to_a_disk_both() -> None:
    host, disk = (load_config("giant_1gpu.yaml", (f"engine.moments={where}",), 1) for where in ("host", "disk"))
    moments, ema = (predict(host, 1, DEFAULT_HARDWARE, each) for each in (Transfers(10**11), Transfers(ema=10**11)))
    assert moments.parts["transfer"] == ema.parts["transfer"] == pytest.approx(5e10 / HOST_RATE)
    both = predict(disk, 1, DEFAULT_HARDWARE, Transfers(10**11, 10**11))
    assert both.parts["transfer"] == pytest.approx(1e11 / DISK_RATE + 5e10 / HOST_RATE)
    planned = Machine(1).plan(host)
    estimate = Machine(1).estimate_step(host, planned)
    assert estimate.by_operation is not None and estimate.by_operation.parts["transfer"] > 1
    assert planned.transfer_bytes_per_step == 2 * sum(
        part.num_bytes for part in planned.parts if part.location == "host" and part.name in STATES
    )


def test_forward_and_backward_hide_copies_of_activations() -> None:
    words = ("engine.checkpointing=block", "engine.offload_checkpoints=true", "data.global_batch=null")
    config = load_config("giant.yaml", words, 1)
    transfers = Machine(1).plan(config).transfers
    assert transfers.activations > 0 == transfers.moments == transfers.ema
    time = predict(config, 1, DEFAULT_HARDWARE, transfers)
    assert set(time.offloading.values()) == {transfers.activations / 2 / HOST_RATE}
    assert time.parts["transfer"] == 0 and time.seconds == predict(config, 1, DEFAULT_HARDWARE).seconds
    # longer than both passes
    longer = predict(config, 1, DEFAULT_HARDWARE, replace(transfers, activations=10**12))
    busy = sum(region.seconds for region in longer.regions if region.phase in (FORWARD, BACKWARD))
    assert longer.parts["transfer"] == pytest.approx(1e12 / HOST_RATE - busy)


def test_a_given_rate_keeps_the_ratio_of_fp8_to_bf16() -> None:
    given = replace(DEFAULT_HARDWARE, flops=1e13)
    assert predicted("engine.fp8=true", hardware=given).seconds < predicted(hardware=given).seconds


def test_gpus_have_options() -> None:
    assert gpu_of_option("RTX 4090").capacity == 24 * 10**9 and gpu_of_option("h100pcie").bf16 == 756e12
    with pytest.raises(ValueError, match="choose one of"):
        gpu_of_option("h1000")


@pytest.mark.parametrize(
    ("device", "option"),
    [
        ("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA A10", "a10"), ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA Z1", None), ("cpu", None),
    ],
)  # fmt: skip
def test_a_device_has_the_most_specific_gpu_of_its_name(device: str, option: str | None) -> None:
    gpu = gpu_of_device(device)
    assert (gpu and gpu.option) == option
