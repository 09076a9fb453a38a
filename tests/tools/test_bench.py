"""The benchmarks run, end in one flat JSON object, and write result files."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from drawn_images import drawn_image, encoded
from PIL import Image

from shards.packing.pack import PackOptions, pack

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench.py"


def bench(*arguments: str | Path, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def set_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.jpg")
    pack(folder / "images", folder / "set", PackOptions())
    return folder / "set"


def test_order_finds_the_first_slot_of_a_huge_set() -> None:
    done = bench("order", "--samples", "1.7e9", "--shard-samples", "10000", "--world", "256", "--at", "0.5", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["num_shards"] == 170_000
    assert 0 < result["seconds_to_first_slot"] < 5  # 0.1 s on an idle machine
    assert result["peak_rss_bytes"] < 200e6


SMALL = ("--batch", "2", "crops.global_size=32", "crops.local_size=16", "crops.local_count=1")


def test_loader_prints_its_keys(set_path: Path) -> None:
    done = bench("loader", "--set", set_path, *SMALL, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {"images_per_second", "cpu_seconds_per_image", "peak_rss_bytes", "wait_share"}
    assert all(value >= 0 for value in result.values()) and result["images_per_second"] > 0


def test_save_writes_medians_of_the_repeats_with_provenance(tmp_path: Path) -> None:
    path = tmp_path / "results" / "order.json"
    done = bench("order", "--samples", "1e6", "--repeats", "3", "--save", path, "--json")
    assert done.returncode == 0, done.stderr
    document, printed = json.loads(path.read_text()), json.loads(done.stdout.splitlines()[-1])
    assert document["result"] == printed and document["repeats"] == 3
    assert document["command"] == "python tools/bench.py order --samples 1e6 --repeats 3 --json"
    for key, value in printed.items():
        low, high = document["spread"][key]
        assert low <= value <= high
    assert document["versions"]["torch"] and document["hardware"]["cores"] >= 1 and document["hardware"]["cpu"]
    assert set(document) >= {"benchmark", "date", "commit", "has_uncommitted_changes"}
    assert [file.name for file in path.parent.iterdir()] == ["order.json"]


def test_decoder_uses_every_odd_image_and_quarantines_every_corrupt_one() -> None:
    sys.path.insert(0, str(BENCH.parent))
    from benchmarks.decoder_agreement import NUM_GOOD, run

    result = run("cpu")
    assert result["failures"] == [] and result["odd_images"] + result["corrupt_images"] >= 40
    assert result["used_images"] == NUM_GOOD + result["odd_images"]
    assert result["quarantined_images"] == result["corrupt_images"] == len(result["quarantine_reasons"])
    # the CPU's decoder against itself
    assert result["pixel_difference_max"] == result["crop_difference_max"] == 0


def test_median_result_keeps_integers_and_text() -> None:
    sys.path.insert(0, str(BENCH.parent))
    from benchmarks.results import median_result

    runs = [{"a": 1, "b": 0.5, "c": "x"}, {"a": 4, "b": 1.0, "c": "y"}, {"a": 2, "b": 9.0, "c": "x"}]
    assert median_result(runs) == {"a": 2, "b": 1.0, "c": "x"}
    assert type(median_result(runs[:2])["a"]) is int


@pytest.mark.slow
def test_loader_ratio_against_webdataset(set_path: Path) -> None:
    done = bench("loader", "--set", set_path, *SMALL, "--compare", "webdataset", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    expected = result["webdataset_cpu_seconds_per_image"] / result["cpu_seconds_per_image"]
    assert result["ratio"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "nowhere"], "nowhere"),
        (["--set", "nowhere", "--batches", "3"], "at least 40"),
        (["--set", "nowhere", "crops.golbal_size=32"], "did you mean crops.global_size"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str) -> None:
    done = bench("loader", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_slope_is_zero_within_its_error_without_a_leak_and_not_with_one() -> None:
    sys.path.insert(0, str(BENCH.parent))
    from benchmarks.stream_memory import slope_with_error

    noise = np.random.default_rng(0).normal(0, 1e5, 3000)
    slope, error = slope_with_error(3e8 + noise)
    assert abs(slope) < error
    slope, error = slope_with_error(3e8 + noise + 100.0 * np.arange(3000))
    assert abs(slope - 100.0) < error < 20.0


def pack_drawn_set(folder: Path, count: int) -> Path:
    images = ((f"{number}.jpg", encoded(drawn_image(number, 60, 45))) for number in range(count))
    with tarfile.open(folder / f"{count}.tar", "w") as tar:
        for name, payload in images:
            header = tarfile.TarInfo(name)
            header.size = len(payload)
            tar.addfile(header, io.BytesIO(payload))
    pack(folder / f"{count}.tar", folder / str(count), PackOptions(shard_bytes=250_000), workers=2)
    return folder / str(count)


@pytest.mark.slow
def test_stream_memory_is_flat_and_independent_of_the_set_size(tmp_path: Path) -> None:
    resident = []
    for count in (1_500, 15_000):
        done = bench("stream", "--set", pack_drawn_set(tmp_path, count), "--samples", "50000", "--json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        # even a flat line has a slope of a few 4 KB pages in total
        assert result["samples"] >= 50_000 and result["rss_slope_low"] * result["samples"] < 100_000
        resident.append(result["rss_bytes"])
    assert resident[1] == pytest.approx(resident[0], rel=0.1)


HEAD = "{prototypes: 96, hidden: 32, bottleneck: 16}"
TINY = (
    "model.preset=null", "model.dim=48", "model.depth=2", "model.num_heads=2", "model.drop_path=0.0",
    "model.layerscale=0.5", "crops.global_size=64", "crops.local_size=32", "crops.local_count=2",
    f"objective.global_loss.head={HEAD}", f"objective.patch_loss.head={HEAD}", "engine.dtype=fp32",
)  # fmt: skip


def test_plain_step_has_the_same_losses_and_gradients() -> None:
    sys.path.insert(0, str(BENCH.parent))
    import torch

    from benchmarks.plain_step import PlainStep
    from benchmarks.training_step import make_noise_batch
    from streamtrain.config.load import load_config
    from streamtrain.model.initialise import initialise
    from streamtrain.objective.prototypes import PlainWeight
    from streamtrain.objective.targets import TargetMaker, TeacherPrototypes
    from streamtrain.training.ssl_model import SSLModel

    config = load_config("vits16.yaml", [*TINY, "data.micro_batch=4"])
    batch = make_noise_batch(config, torch.device("cpu"))
    network = SSLModel(config)
    initialise(network, config.model, config.run.seed)
    heads = (network.global_head, network.patch_head)
    handles = TeacherPrototypes(*(PlainWeight(head.prototypes.weight) for head in heads if head is not None))
    (targets,) = TargetMaker(config.objective).make([network.teacher_features(batch)], handles, 0.05)
    losses = network.student_losses(batch, targets)
    plain = PlainStep(config, torch.device("cpu"), autocast=False)
    assert {n: p.shape for n, p in plain.student.named_parameters()} == {
        n: p.shape for n, p in network.named_parameters()
    }
    expected_losses = plain.losses(batch, 0.05)
    assert losses.keys() == expected_losses.keys()
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected_losses[name].item(), rel=1e-5), name
    losses["total"].backward()
    expected_losses["total"].backward()
    expected = dict(plain.student.named_parameters())
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-6, msg=name)


def test_step_times_and_phases_are_measured_separately() -> None:
    sys.path.insert(0, str(BENCH.parent))
    from benchmarks.training_step import PHASES, PhaseTimer, StepTimer

    phases, timer = PhaseTimer(on_gpu=False, is_enabled=False), StepTimer(on_gpu=False)
    phases.begin()
    phases.end("forward")
    assert not phases.seconds
    phases.is_enabled = True
    for _ in range(3):
        timer.mark()
        phases.begin()
        phases.end("forward")
    assert [list(each) for each in phases.seconds] == [list(PHASES)] * 3
    assert len(timer.seconds()) == 2 and min(timer.seconds()) >= phases.seconds[0]["forward"] >= 0


@pytest.mark.slow
def test_step_ratios_and_shares() -> None:
    options = ("--batch", "4", "--steps", "1", "--compare", "plain", "--json")
    done = bench("step", "--config", "vits16.yaml", *options, *TINY)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ratio"] == pytest.approx(result["images_per_second"] / result["plain_images_per_second"])
    shares = [value for key, value in result.items() if key.endswith("_share") and not key.startswith("plain_")]
    # the communication share is part of the other shares
    assert 0.9 < sum(shares) - result["communication_share"] <= 1.01
    assert result["peak_ratio"] > 0 and 0 < result["mfu"] < 1
    parts = [value for key, value in result.items() if key.startswith("start_")]
    assert min(parts) >= 0 and sum(parts) == pytest.approx(2 * result["start_to_first_step_seconds"])


@pytest.mark.slow
def test_continue_keeps_what_the_network_knew(tmp_path: Path) -> None:
    """Continued on stripes, a network forgets drawn images without an anchor; with it and adapters, it does not."""
    draw_stripes(tmp_path / "stripes", train=300, test=60)
    given = ("--images", tmp_path / "stripes", "--base-steps", "600", "--steps", "200", "--seeds", "1")
    done = bench("continue", "--folder", tmp_path / "runs", *given, "--json", timeout=1800)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    ((start,), kept, forgotten) = (
        result["accuracies"][way]["a"] for way in ("start", "LoRA and anchor", "first recipe")
    )
    assert start > 60 and kept[0] > start - 4 and forgotten[0] < start - 8
    assert "| anchor |" in done.stdout
    curve = result["curves"]["anchor-0"]
    assert curve["step"] == [0, 50, 100, 150, 200] and curve["cka_a"][0] == 1.0 and len(curve["knn_b"]) == 5


@pytest.mark.slow
def test_accuracy_compares_seeds_with_pixels_and_no_training(tmp_path: Path) -> None:
    """The table has the accuracies of both tasks; a second call trains nothing and prints the same."""
    draw_stripes(tmp_path / "stripes", train=40, test=20)
    given = ["--images", tmp_path / "stripes", "--folder", tmp_path / "runs", "--seeds", "2", "run.steps=20"]
    given += ["schedules.lr.warmup=4", "evaluation.every=0", "--json"]
    printed = [bench("accuracy", *given, timeout=900) for _ in range(2)]
    assert printed[0].returncode == 0, printed[0].stderr
    result = json.loads(printed[0].stdout.splitlines()[-1])
    assert len(result["accuracies"]["trained"]["knn"]) == len(result["accuracies"]["trained"]["linear"]) == 2
    assert 0 < min(result["cpu_hours"]) < 0.5 and "trained | " in printed[0].stdout and "±" in printed[0].stdout
    assert printed[1].stdout == printed[0].stdout
    assert (tmp_path / "runs/run-0/config.yaml").exists() and result["accuracies"]["pixels"]["knn"] > 20


def draw_stripes(folder: Path, train: int, test: int) -> None:
    """Write images of stripes in four classes, their angles."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        for name in range(4):
            (folder / part / str(name)).mkdir(parents=True)
            for number in range(count):
                stripes(rng, name * np.pi / 4).save(folder / part / str(name) / f"{number}.png")


def stripes(rng: np.random.Generator, angle: float) -> Image.Image:
    """Draw stripes in two random colours, of random width and almost at ``angle``."""
    rows, columns = np.mgrid[0:48, 0:48]
    angle += rng.normal(0, 0.2)
    wave = np.sin((rows * np.sin(angle) + columns * np.cos(angle)) * rng.uniform(0.3, 1.0) + rng.uniform(0, 6))
    first, second = rng.uniform(0, 255, (2, 3))
    pixels = np.where(wave[..., None] > 0, first, second) + rng.normal(0, 20, (48, 48, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.slow
def test_health_tells_faults_from_healthy_runs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in range(4):
        folder = tmp_path / "stripes" / str(name)
        folder.mkdir(parents=True)
        for number in range(40):
            stripes(rng, name * np.pi / 4).save(folder / f"{number}.png")
    given = ("--images", tmp_path / "stripes", "--runs", "5", "--first-seed", "1")
    done = bench("health", "--folder", tmp_path / "runs", *given, "--json", timeout=1800)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["runs"] == 5 and result["right"] >= 4
    assert result["matrix"]["temperature 1"] == {"entropy collapse": 1}
    assert result["matrix"]["features of few dimensions"] == {"rank collapse": 1}
