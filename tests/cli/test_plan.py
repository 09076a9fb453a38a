"""``streamtrain plan``: in seconds, without torch, as text and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ENVIRONMENT, run_command
from PIL import Image
from ranks import ROOT

from streamtrain import pack
from streamtrain.cli.main import main


def run_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_command("plan", *arguments)


EIGHT = ("--config", "giant.yaml", "--gpus", "8", "--gpu-memory", "80GB")
ONE = ("--config", "giant_1gpu.yaml", "--gpus", "1", "--gpu-memory", "141GB", "--host-memory", "128GB")


@pytest.mark.parametrize("arguments", [EIGHT, ONE], ids=["eight", "one"])
def test_giant_recipe_fits_and_its_arithmetic_is_printed(arguments: tuple[str, ...]) -> None:
    done = run_plan(*arguments, "--verbose", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    *text, last = done.stdout.splitlines()
    document = json.loads(last)
    assert document["fits"] is True and document["num_parameters"] == 7_028_020_096
    assert document["num_backbone_parameters"] == 6_716_043_264
    for key in ("gpu_bytes", "host_bytes", "disk_bytes", "flops_per_step", "step_seconds"):
        assert document[key] > 0
    shown = "\n".join(text)
    assert "values of this rank x 4 B" in shown and "<- peak" in shown
    # the verdict first, the buffers only after the summary
    assert shown.index("fits ") < shown.index("GPU-hours") < shown.index("values of this rank x 4 B")
    assert "values of this rank" not in run_plan(*arguments).stdout
    # the bytes of a phase are the sum of its parts
    for phase, num_bytes in document["gpu_bytes_by_phase"].items():
        parts = [p for p in document["parts"] if p["place"] == "gpu" and {"always", phase} & set(p["when"])]
        assert num_bytes == sum(part["bytes"] for part in parts)


def test_plan_takes_seconds_and_does_not_import_torch() -> None:
    code = f"import sys; from streamtrain.cli.main import main; assert main({['plan', *EIGHT, '--fit']!r}) == 0\n"
    code += "assert not {'torch', 'deepspeed'} & set(sys.modules)"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 20  # 2 s on an idle machine


def test_time_follows_the_gpu_the_network_and_the_loader() -> None:
    words = ("--config", "giant.yaml", "--gpus", "256", "--json")
    texts, documents = {}, {}
    for name, options in {
        "default": (), "h100": ("--gpu", "h100"), "a100": ("--gpu", "a100"), "slow": ("--network", "10"),
        "loader": ("--loader-rate", "10"), "rate": ("--tflops", "100"),
    }.items():  # fmt: skip
        *lines, last = run_plan(*words, *options).stdout.splitlines()
        texts[name], documents[name] = "\n".join(lines), json.loads(last)
    default = documents["default"]
    assert "H100" in texts["default"] and "images/s per GPU" in texts["default"] and "MFU" in texts["default"]
    assert default["gpu"] == "h100" and default["bound"] == "matmul" and 0 < default["mfu"] < 1
    assert sum(default["time_parts"].values()) == pytest.approx(default["step_seconds"])
    assert default["images_per_second"] == pytest.approx(4096 / default["step_seconds"])
    assert default["network_hidden_from_micro_batch"] <= 16 and default["time_regions"]
    assert "\ncauses    matmul" in texts["default"] and "\ngathers   hidden" in texts["default"]
    assert "not overlapped, because engine.live_blocks is 1" in run_plan(*words[:-1], "engine.live_blocks=1").stdout
    # naming a GPU also checks its memory
    assert "80.0 GB per GPU" in texts["h100"] and documents["h100"]["step_seconds"] == default["step_seconds"]
    assert documents["a100"]["step_seconds"] > default["step_seconds"]
    assert documents["slow"]["bound"] == "network" and documents["loader"]["bound"] == "loader"
    assert documents["rate"]["assumed_flops_per_second"] == 100e12
    assert documents["rate"]["step_seconds"] > 2 * default["step_seconds"]


def test_fit_finds_settings_where_the_recipe_does_not_fit() -> None:
    words = ("--config", "giant.yaml", "--gpus", "1", "--gpu-memory", "141GB", "--host-memory", "128GB")
    done = run_plan(*words)
    assert done.returncode == 1 and "does NOT fit" in done.stdout and "too much" in done.stdout
    assert "one of these changes" in done.stdout and "engine.moments=" in done.stdout
    # where no single change is enough, it names several
    tighter = run_plan(*words[:5], "98GB", *words[6:])
    assert tighter.returncode == 1 and "together" in tighter.stdout and "engine.moments=" in tighter.stdout
    fitted = run_plan(*words, "--fit", "--json")
    document = json.loads(fitted.stdout.splitlines()[-1])
    assert fitted.returncode == 0 and document["fits"]
    again = run_plan(*words, *document["overrides"])
    assert again.returncode == 0, again.stdout
    assert run_plan(*words[:5], "20GB", "--fit").returncode == 1


def test_the_recipe_alone_is_enough() -> None:
    done = run_plan("--config", "vits16.yaml")
    assert done.returncode == 0, done.stderr
    assert "--gpu-memory" in done.stdout and " 8 GB" in done.stdout and "per step of 16 images" in done.stdout
    assert len(done.stdout.splitlines()) <= 12 and max(map(len, done.stdout.splitlines())) <= 160


@pytest.mark.parametrize(
    ("words", "has_gpu", "is_shown"),
    [
        ([], False, True), ([], True, False), (["--gpu-memory", "80GB"], False, False),
        (["--device", "gpu"], False, False), (["--device", "cpu"], False, False),
    ],
)  # fmt: skip
def test_only_a_plan_for_missing_gpus_names_the_cpu(
    words: list[str], has_gpu: bool, is_shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("streamtrain.cli.plan.has_gpu_driver", lambda: has_gpu)
    assert main(["plan", "--config", "vits16.yaml", *words]) in (0, 1)
    assert ("--device cpu plans" in capsys.readouterr().out) == is_shown


def test_a_change_that_makes_it_fit_is_named() -> None:
    words = ("--config", "vitl16.yaml", "--gpu-memory", "24GB", "data.micro_batch=64", "engine.checkpointing=none")
    done = run_plan(*words, "--json")
    document = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1 and not document["fits"]
    change = "engine.checkpointing=block"
    assert change in document["changes"] and f"  {change}" in done.stdout
    assert run_plan(*words[:-1], change).returncode == 0


def test_ranks_on_a_cpu_are_compared_with_this_machine() -> None:
    words = ("--config", "quickstart.yaml", "--device", "cpu")
    done = run_plan(*words, "--json")
    document = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout
    assert document["gpu_bytes"] == 0 and 0.5e9 < document["rank_bytes"] == document["host_bytes"] < 3e9
    assert (
        "per process" in done.stdout
        and "GPU" not in done.stdout.split("{")[0].replace("--gpu", "")
        and "assuming" in done.stdout
    )
    two = json.loads(run_plan(*words, "--ranks", "2", "--json").stdout.splitlines()[-1])
    assert two["host_bytes"] == 2 * two["rank_bytes"]
    small = run_plan(*words, "--host-memory", "500MB")
    assert small.returncode == 1 and "does NOT fit" in small.stdout and "no settings" in small.stdout
    # the time follows the assumption
    times = [
        json.loads(run_plan(*words, "--tflops", rate, "--json").stdout.splitlines()[-1])["step_seconds"]
        for rate in ("0.001", "0.002")
    ]
    assert times[0] == pytest.approx(2 * times[1], rel=0.3) and times[0] > times[1]


def test_large_photographs_of_the_set_are_counted(tmp_path: Path) -> None:
    for name, side in (("small", 100), ("large", 2000)):
        (tmp_path / name).mkdir()
        for index in range(4):
            Image.new("RGB", (side, side), (index, 0, 0)).save(tmp_path / name / f"{index}.png")
        pack(str(tmp_path / name), str(tmp_path / f"set-{name}"), max_side=4000)
    needed = [
        json.loads(
            run_plan(
                "--config", "vits16.yaml", "--device", "cpu", "--json", f"data.shards={tmp_path}/set-{name}"
            ).stdout.splitlines()[-1]
        )["rank_bytes"]
        for name in ("small", "large")
    ]
    # a plan for another machine does not need the set
    elsewhere = run_plan("--config", "vits16.yaml", "data.shards=/absent/set")
    assert elsewhere.returncode == 0 and "assumed because /absent/set cannot be read" in elsewhere.stdout
    # three batches of 16 decoded images
    assert needed[1] - needed[0] == pytest.approx(3 * 16 * 3 * (2000**2 - 100**2), rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config", "absent.yaml", *EIGHT[2:]), "no config"),
        ((*EIGHT, "model.dpeth=3"), "did you mean model.depth"),
        ((*EIGHT[:5], "eighty"), "is not a size"),
        ((*EIGHT, "data.micro_batch=7"), "not a multiple"),
        ((*EIGHT, "--device", "cpu"), "--gpu-memory has no effect"),
        ((*EIGHT, "--tflops", "fast"), "is not a number"),
        ((*EIGHT[:4], "--fit"), "--fit needs --gpu"),
        ((*EIGHT[:4], "--gpu", "h1000"), "choose one of"),
        ((*EIGHT[:4], "--device", "cpu", "--gpu", "h100"), "--gpu has no effect"),
        ((*EIGHT[:4], "--gpu", "a100", "engine.fp8=true"), "A100 has no FP8 matmuls: choose another --gpu"),
        ((*EIGHT[:4], "--network", "0"), "is not a number above 0"),
    ],
)
def test_an_error_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = run_plan(*arguments)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
