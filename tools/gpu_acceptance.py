#!/usr/bin/env python3
"""Test and measure streamtrain on one GPU: its tests, decoder, loader, steps, memory, a profile, the 7B network.

python tools/gpu_acceptance.py                  # parts for about 25 minutes; run it again for the rest
python tools/gpu_acceptance.py --minutes 8      # the same for at most 8 minutes
python tools/gpu_acceptance.py --cpu            # the same parts with tiny networks on a CPU, about 3 minutes
python tools/gpu_acceptance.py --list           # the parts and their commands
python tools/gpu_acceptance.py --predict FILE   # predicted / measured time and memory of the steps in a result

The result is benchmarks/results/gpu_CARD_DATE.json: for each part its command, exit status, seconds, and the JSON
object or the last lines that it printed, the commit and the versions. A part that fails does not stop the others, and
is repeated by the next call; a part that passed is not. Steps that do not fit into the memory of the GPU, by the plan,
are skipped. Not run on a GPU yet.
"""

from __future__ import annotations

import importlib.util
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

# without these, no part runs; without the others, some parts fail
REQUIRED = (
    "numpy", "PIL", "torch", "deepspeed", "nvidia.dali", "pydantic", "yaml", "webdataset", "fsspec", "filelock",
    "tenacity", "tqdm", "tensorboard", "safetensors", "matplotlib", "packaging",
)  # fmt: skip
OTHERS = ("pytest", "hypothesis", "torchao")


def missing_packages(names: tuple[str, ...]) -> list[str]:
    """Return the packages that this Python lacks."""

    def is_missing(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is None
        except ModuleNotFoundError:
            return True

    return [name for name in names if is_missing(name)]


if __name__ == "__main__" and (absent := missing_packages(REQUIRED)):
    # before imports that need them
    sys.exit(f"error: missing packages: {', '.join(absent)}")

from streamtrain.run import interrupts

if __name__ == "__main__":
    # before the slow imports
    interrupts.end_quietly_on_interrupt()
    interrupts.raise_on_interrupt()

import json
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from streamtrain.planning.peak import gpu_of_device
from streamtrain.run.atomic_io import write_file
from streamtrain.run.command_line import CommandParser, local_path
from streamtrain.run.machine import host_memory
from streamtrain.run.provenance import program_versions
from streamtrain.run.signals import EXIT_INTERRUPTED

ROOT = Path(__file__).resolve().parents[1]
# shown of a part that printed no JSON
LAST_LINES = 15
# the least that --minutes allows: no part takes longer
LEAST_MINUTES = 8.0
# of the memory of the GPU and of the host, for the settings of the 7B network: plans are not measured on a GPU yet
USABLE = 0.9
TINY = (
    "model.dim=64", "model.depth=2", "model.num_heads=1", "crops.global_size=64", "crops.local_size=32",
    "objective.global_loss.head={prototypes: 64, hidden: 32, bottleneck: 16}",
    "objective.patch_loss.head={prototypes: 64, hidden: 32, bottleneck: 16}", "engine.device=cpu", "engine.dtype=fp32",
)  # fmt: skip
# an installed command may be missing, and belong to another checkout
STREAMTRAIN = (sys.executable, "-m", "streamtrain.cli.main")
BENCH = (sys.executable, "tools/bench.py")
# micro-batches, the middle one also without compilation, in FP8 and with the loader
BATCHES = {"vits16": (32, 128, 256), "vitb16": (32, 64, 128), "vitl16": (16, 32, 64)}


# streamtrain need not be installed, and may be installed from another checkout
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


@dataclass(frozen=True)
class Part:
    """One command; ``seconds`` is the most that it may take."""

    name: str
    words: Sequence[str]
    seconds: float
    # arguments of `streamtrain plan` for the settings of this part, if it runs steps
    planned: Sequence[str] = ()


def parts(work: Path, cpu: bool, gpu_bytes: int, card: str, result: Path) -> Iterator[Part]:
    """Yield the parts in order; the first makes the images that others read, in ``work``."""
    images, shards = work / "images", work / "set"
    small: Sequence[str] = TINY if cpu else ()
    count, side, device = (200, 96, "cpu") if cpu else (4000, 448, "cuda")
    draw = [sys.executable, "tools/make_demo_images.py", "--out", images, "--count", count, "--size", side]
    pack = [*STREAMTRAIN, "pack", "--src", images, "--out", shards]
    yield Part("images", ["sh", "-c", f"{shlex.join(map(str, draw))} && {shlex.join(map(str, pack))}"], 240)
    # without a GPU, the tests of its streams
    chosen = ["tests/test_streams.py"] if cpu else ["-m", "gpu", *files_of_gpu_tests()]
    yield Part("tests", [sys.executable, "-m", "pytest", "-q", *chosen], 420)
    yield Part("decoder", [*BENCH, "decoder", "--device", device, "--json"], 180)
    for batch in (16,) if cpu else (32, 128):
        words = ["loader", "--set", str(shards), "--batch", str(batch), "--device", device, "--json"]
        yield Part(f"loader, batch {batch}", [*BENCH, *words], 120)

    # with noise, the loader does not limit the steps
    for model in ("vitl16",) if cpu else BATCHES:
        for batch in (2,) if cpu else BATCHES[model]:
            yield _steps(f"step, {model}, batch {batch}", model, batch, small)
    yield from _memory(shards, "vitl16", 2 if cpu else 32, small, cpu)
    profile = ["profile", "--config", "vitl16.yaml", "--batch", "2" if cpu else "32", "--json", *small]
    yield Part("profile of vitl16", [*BENCH, *profile], 180)
    giant = TINY_GIANT if cpu else giant_settings(gpu_bytes, card)
    if giant is not None:
        words = ["step", "--config", "giant.yaml", "--data", str(shards), "--steps", "3", "--json", *giant]
        yield Part("7B, three steps", [*BENCH, *words], 450, ["--config", "giant.yaml", *giant])

    variants = {"eager": "engine.compile=off"}
    gpu = gpu_of_device(card)
    # FP8 needs bf16 and a GPU with FP8 matmuls
    if not cpu and (gpu is None or gpu.fp8):
        variants["fp8"] = "engine.fp8=true"
    for model in ("vitl16",) if cpu else reversed(BATCHES):
        for name, setting in variants.items():
            yield _steps(f"step, {model}, {name}", model, 2 if cpu else BATCHES[model][1], [*small, setting])
    for model in () if cpu else ("vits16", "vitb16"):
        yield from _memory(shards, model, BATCHES[model][1], small, cpu)
    yield Part("prediction", [sys.executable, "tools/gpu_acceptance.py", "--predict", str(result)], 120)


# two micro-batches a step
TINY_GIANT = (*TINY, "data.micro_batch=2", "data.global_batch=4")


def _steps(name: str, model: str, batch: int, settings: Sequence[str]) -> Part:
    """Return the part that times the step of a model, in one micro-batch."""
    words = ["step", "--config", f"{model}.yaml", "--batch", str(batch), "--steps", "6", "--json", *settings]
    return Part(name, [*BENCH, *words], 180, ["--config", f"{model}.yaml", *_one_micro_batch(batch), *settings])


def _memory(shards: Path, model: str, batch: int, settings: Sequence[str], cpu: bool) -> Iterator[Part]:
    """Yield the part that trains with the loader: peak memory against the plan, and the wait for data."""
    chosen = [*_one_micro_batch(batch), *settings, *(() if cpu else ("engine.dtype=bf16",)), f"data.shards={shards}"]
    words = ["memory", "--config", f"{model}.yaml", "--steps", "3" if cpu else "10", "--json", *chosen]
    yield Part(f"training, {model}", [*BENCH, *words], 240, ["--config", f"{model}.yaml", *chosen])


def _one_micro_batch(batch: int) -> tuple[str, ...]:
    return (f"data.micro_batch={batch}", "data.global_batch=null")


def files_of_gpu_tests() -> list[str]:
    """Return the test files with tests for a GPU: the others need more packages than a GPU machine may have."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "mark.gpu" in file.read_text("utf-8")]


def giant_settings(gpu_bytes: int, card: str) -> list[str] | None:
    """Return the fastest settings with which the 7B network fits this GPU and host; None if there are none."""
    memory = host_memory()
    words = ["--config", "giant.yaml", "--fit", "--gpu-memory", str(int(USABLE * gpu_bytes)), "data.global_batch=16"]
    if memory is not None:
        words += ["--host-memory", str(int(USABLE * memory.free))]
    return planned["overrides"] if (planned := plan(words, card)) else None


def plan(words: Sequence[str], card: str = "") -> dict[str, Any] | None:
    """Return the document of ``streamtrain plan --json``; None if the plan failed, or no settings fit.

    ``card``: CUDA's name of the GPU, for the time of a step; the default GPU if the planner does not know it.
    """
    gpu = gpu_of_device(card)
    command = [*STREAMTRAIN, "plan", *words, "--json", *(["--gpu", gpu.option] if gpu else [])]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    # status 1: it does not fit
    if done.returncode not in (0, 1):
        return None
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        return None


def predict(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return predicted and measured seconds and peak bytes of each part that ran steps, by its name."""
    on_gpu = document["gpu_bytes"] > 0
    compared = {}
    for name, record in document["parts"].items():
        result = record.get("result", {})
        words = record.get("planned")
        if not words or "step_seconds" not in result:
            continue
        planned = plan([*words, "--device", "gpu" if on_gpu else "cpu"], document["card"] if on_gpu else "")
        if planned is None:
            continue
        row = {"predicted_seconds": planned.get("step_seconds"), "measured_seconds": result["step_seconds"]}
        if row["predicted_seconds"]:
            row["seconds_ratio"] = row["predicted_seconds"] / row["measured_seconds"]
        # a training run measures all memory of the GPU, a bare step only torch's
        if "measured_peak_bytes" in result:
            row |= {"predicted_bytes": result["planned_peak_bytes"], "measured_bytes": result["measured_peak_bytes"]}
            row["bytes_ratio"] = row["predicted_bytes"] / row["measured_bytes"]
        compared[name] = row
    return compared


def run_part(part: Part, gpu_bytes: int = 0) -> dict[str, Any]:
    """Run a part and return its record; a part that does not fit into the memory of the GPU is skipped."""
    print(f"== {part.name}", flush=True)
    record: dict[str, Any] = {"command": shlex.join(part.words)}
    if part.planned:
        record["planned"] = [*part.planned]
    if part.planned and gpu_bytes:
        planned = plan(part.planned)
        if planned is not None and planned["gpu_bytes"] > gpu_bytes:
            print("   skipped, more memory than the GPU has", flush=True)
            return record | {"status": 0, "seconds": 0.0, "skipped": f"needs {planned['gpu_bytes'] / 1e9:.3g} GB"}
    began = time.monotonic()
    with subprocess.Popen(
        part.words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True, env=ENVIRONMENT,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=part.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            output = f"{output.rstrip()}\nended after {part.seconds:g} s"
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    lines = output.strip().splitlines()
    record |= {"status": process.returncode, "seconds": round(time.monotonic() - began, 1)}
    try:
        printed = json.loads(lines[-1])
        record |= {"result": printed if isinstance(printed, dict) else {"last": printed}}
    except (IndexError, ValueError):
        record |= {"lines": lines[-LAST_LINES:]}
    shown = "passed" if process.returncode == 0 else f"failed, exit status {process.returncode}"
    print(f"   {shown}, {record['seconds']:g} s", flush=True)
    reasons = record.get("lines") or record.get("result", {}).get("failures", [])
    for line in reasons if process.returncode else []:
        print(f"   {line}", flush=True)
    return record


def run_all(
    chosen: Sequence[Part], path: Path, card: Mapping[str, Any], program: Mapping[str, Any], minutes: float
) -> dict[str, Any]:
    """Run the parts that have not passed by ``path``, while they fit into ``minutes``; return the document.

    Args:
        card: keys of the document, if it is new.
        program: keys of each part that runs: commit and versions.
    """
    document = read_result(path) if path.exists() else {**card, "parts": {}}
    records = document["parts"]
    remaining = [part for part in chosen if records.get(part.name, {}).get("status") != 0]
    # failed parts are repeated last: they may use up the time of each call
    remaining.sort(key=lambda part: part.name in records)
    deadline = time.monotonic() + 60 * minutes
    for part in remaining:
        if time.monotonic() + part.seconds > deadline:
            print(
                f"stopped before {part.name}, which may take {part.seconds:g} s; run the same command again to continue"
            )
            break
        records[part.name] = run_part(part, document["gpu_bytes"]) | {"program": dict(program)}
        write_file(path, json.dumps(document, indent=2).encode() + b"\n")
    return document


def read_result(path: Path) -> dict[str, Any]:
    """Return the document that this script wrote; raises SystemExit for any other file."""
    try:
        document = json.loads(path.read_text("utf-8"))
        is_result = isinstance(document["card"], str) and isinstance(document["gpu_bytes"], int)
        is_result = is_result and all(isinstance(record, dict) for record in document["parts"].values())
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        is_result = False
    if not is_result:
        sys.exit(f"error: {path} is not a result of this script")
    return dict(document)


def describe_card(cpu: bool) -> dict[str, Any]:
    """Return the name and the memory of the card; raises SystemExit without a GPU."""
    import torch

    if not cpu and not torch.cuda.is_available():
        sys.exit("error: torch finds no GPU; --cpu tests this script without one")
    properties = None if cpu else torch.cuda.get_device_properties(0)
    return {
        "card": properties.name if properties else "cpu",
        "gpu_bytes": properties.total_memory if properties else 0,
    }


def describe_program() -> dict[str, Any]:
    """Return the commit, the versions, and the packages without which some parts fail."""
    return {
        "versions": program_versions(),
        "missing_packages": missing_packages(OTHERS),
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip(),
    }


def print_prediction(path: Path) -> int:
    """Print the comparison with the plan as a table, and as JSON in the last line."""
    compared = predict(read_result(path))
    for name, row in compared.items():
        print(f"{name:32} {' '.join(f'{key} {value:.4g}' for key, value in row.items() if value is not None)}")
    print(json.dumps(compared))
    return 0


def main() -> int:
    """Run the command line, also if the reader of its output ends first, such as ``head``."""
    try:
        status = run()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would fail again when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    return status


def run() -> int:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="tiny networks on a CPU, to test this script")
    parser.add_argument(
        "--minutes", type=float, default=25.0, help="stop before a part that may end later (default: 25, at least 8)"
    )
    parser.add_argument("--list", action="store_true", help="print the parts and their commands")
    parser.add_argument("--predict", type=local_path, metavar="FILE", help="plan the steps of a result, and compare")
    parser.add_argument("--out", type=local_path, help="result file (default: benchmarks/results/gpu_CARD_DATE.json)")
    parser.add_argument("--work", type=local_path, help="folder of images and runs (default: build/acceptance_CARD)")
    arguments = parser.parse_args()
    # also not a number
    if not arguments.minutes >= LEAST_MINUTES:
        parser.error(f"--minutes must be at least {LEAST_MINUTES:g}")
    if arguments.predict is not None:
        return print_prediction(arguments.predict)
    facts, program = describe_card(arguments.cpu), describe_program()
    card = "".join(letter if letter.isalnum() else "_" for letter in facts["card"].lower())
    day = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    path = arguments.out or ROOT / "benchmarks" / "results" / f"gpu_{card}_{day}.json"
    work = arguments.work or ROOT / "build" / f"acceptance_{card}"
    chosen = list(parts(work, arguments.cpu, facts["gpu_bytes"], facts["card"], path))
    if arguments.list:
        for part in chosen:
            print(f"{part.name}: {shlex.join(part.words)}")
        return 0
    if program["missing_packages"]:
        print(f"missing packages: {', '.join(program['missing_packages'])}; parts that need them will fail")
    for folder in (path.parent, work):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        document = run_all(chosen, path, facts, program, arguments.minutes)
    except KeyboardInterrupt:
        interrupts.report()
        return EXIT_INTERRUPTED
    failed = [name for name, record in document["parts"].items() if record["status"]]
    results = f"{len(document['parts'])} of {len(chosen)} parts have a result in {path}"
    print(f"{results}; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
