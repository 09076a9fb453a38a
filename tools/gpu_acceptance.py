#!/usr/bin/env python3
"""Test and measure streamtrain on this machine's GPU: the GPU tests, loader, steps, memory, a profile, the 7B network.

python tools/gpu_acceptance.py                  # all parts, about 25 minutes on one GPU
python tools/gpu_acceptance.py --minutes 8      # stop before a part that may take longer; run it again to continue
python tools/gpu_acceptance.py --cpu            # the same parts with tiny networks on a CPU, about 2 minutes

The result is benchmarks/results/gpu_CARD_DATE.json: for each part its command, exit status, seconds, and the JSON
object or the last lines that it printed. A part that fails does not stop the others; a part that has a result is not
run again. Not run on a GPU yet.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from streamtrain.run.atomic_io import write_file
from streamtrain.run.command_line import CommandParser, local_path
from streamtrain.run.signals import EXIT_INTERRUPTED

ROOT = Path(__file__).resolve().parents[1]
# shown of a part that printed no JSON
LAST_LINES = 15
# memory that a 7B network needs with its moments and averages in host memory
GIANT_BYTES = 130e9
TINY = (
    "model.dim=64", "model.depth=2", "model.num_heads=1", "crops.global_size=64", "crops.local_size=32",
    "objective.global_loss.head={prototypes: 64, hidden: 32, bottleneck: 16}",
    "objective.patch_loss.head={prototypes: 64, hidden: 32, bottleneck: 16}", "engine.device=cpu",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One command; ``seconds`` is the most that it may take."""

    name: str
    words: Sequence[str]
    seconds: float


def parts(work: Path, cpu: bool, gpu_bytes: float) -> Iterator[Part]:
    """Yield the parts in order; the first makes the images that others read, in ``work``."""
    python, bench = sys.executable, [sys.executable, "tools/bench.py"]
    streamtrain = str(Path(python).with_name("streamtrain"))
    train = [streamtrain, "train"]
    images, shards = work / "images", work / "set"
    small: Sequence[str] = (*TINY, "engine.dtype=fp32") if cpu else ()
    count, side, device = (200, 96, "cpu") if cpu else (4000, 448, "cuda")
    draw = f"{python} tools/make_demo_images.py --out {shlex.quote(str(images))} --count {count} --size {side}"
    pack = f"{streamtrain} pack --src {shlex.quote(str(images))} --out {shlex.quote(str(shards))}"
    yield Part("images", ["sh", "-c", f"{draw} && {pack}"], 240)
    # without a GPU, the tests of its streams
    chosen = ["tests/test_streams.py"] if cpu else ["-m", "gpu", "tests"]
    yield Part("tests", [python, "-m", "pytest", "-q", *chosen], 420)
    for batch in (16,) if cpu else (32, 128):
        words = ["loader", "--set", str(shards), "--batch", str(batch), "--device", device, "--json"]
        yield Part(f"loader, batch {batch}", [*bench, *words], 120)
    for model, batches in (("vits16", (32, 128, 256)), ("vitb16", (16, 64, 128)), ("vitl16", (16, 32, 64))):
        # the loader belongs to the step; with noise it does not limit it
        for batch in (2,) if cpu else batches:
            words = ["step", "--config", f"{model}.yaml", "--batch", str(batch), "--steps", "6", "--json", *small]
            yield Part(f"step, {model}, batch {batch}", [*bench, *words], 180)
    variants = {"eager": "engine.compile=off", "fp8": "engine.fp8=true"}
    if cpu:
        del variants["fp8"]  # it needs bf16
    for name, override in variants.items():
        words = ["step", "--config", "vitl16.yaml", "--batch", "2" if cpu else "32", "--steps", "6", "--json", override]
        yield Part(f"step, vitl16, {name}", [*bench, *words, *small], 180)
    micro_batch = [f"data.micro_batch={2 if cpu else 32}", "data.global_batch=null"]
    words = ["memory", "--config", "vitl16.yaml", "--steps", "3", "--json", f"data.shards={shards}"]
    dtype = () if cpu else ("engine.dtype=bf16",)
    yield Part("memory against plan", [*bench, *words, *micro_batch, *small, *dtype], 180)
    options = [f"data.shards={shards}", *micro_batch, "run.steps=12", "run.checkpoint_every=0", *small]
    profile = ["monitor.profile={start: 8, steps: 2}", f"run.dir={work / 'profile'}"]
    yield Part("profile of vitl16", [*train, "--config", "vitl16.yaml", *options, *profile], 180)
    options = [*micro_batch, *small, *(["--device", "cpu"] if cpu else [])]
    yield Part("plan of vitl16", [streamtrain, "plan", "--config", "vitl16.yaml", "--json", *options], 60)
    if cpu or gpu_bytes >= GIANT_BYTES:
        giant = [f"data.shards={shards}", f"run.dir={work / 'giant'}", "run.steps=3", "run.checkpoint_every=0", *small]
        limit = ["data.micro_batch=2", "data.global_batch=null"] if cpu else ["data.global_batch=16"]
        yield Part("7B, three steps", [*train, "--config", "giant_1gpu.yaml", *giant, *limit, "--accept", "disk"], 480)


def run_part(part: Part) -> dict[str, Any]:
    """Run a part and return its record."""
    print(f"== {part.name}", flush=True)
    began = time.monotonic()
    with subprocess.Popen(
        part.words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
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
    record = {
        "command": shlex.join(part.words), "status": process.returncode, "seconds": round(time.monotonic() - began, 1)
    }  # fmt: skip
    try:
        found = json.loads(lines[-1])
        record |= {"result": found if isinstance(found, dict) else {"last": found}}
    except (IndexError, ValueError):
        record |= {"lines": lines[-LAST_LINES:]}
    shown = "passed" if process.returncode == 0 else f"failed, exit status {process.returncode}"
    print(f"   {shown}, {record['seconds']:g} s", flush=True)
    return record


def run_all(chosen: Sequence[Part], path: Path, facts: dict[str, Any], minutes: float) -> dict[str, Any]:
    """Run the parts that ``path`` has no result of, while they fit into ``minutes``; return the document."""
    document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {**facts, "parts": {}}
    deadline = time.monotonic() + 60 * minutes
    for part in chosen:
        if part.name in document["parts"]:
            continue
        if time.monotonic() + part.seconds > deadline:
            print(f"{part.name} may take {part.seconds:g} s, which is more than is left; run the same command again")
            break
        document["parts"][part.name] = run_part(part)
        write_file(path, json.dumps(document, indent=2).encode() + b"\n")
    return document


def describe(cpu: bool) -> dict[str, Any]:
    """Return the card and the versions; raises SystemExit without a GPU."""
    import torch

    if not cpu and not torch.cuda.is_available():
        sys.exit("error: torch finds no GPU; --cpu tests this script without one")
    properties = None if cpu else torch.cuda.get_device_properties(0)
    return {
        "card": properties.name if properties else "cpu",
        "gpu_bytes": properties.total_memory if properties else 0,
        "torch": torch.__version__,
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip(),
    }


def main() -> int:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="tiny networks on a CPU, to test this script")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop before a part that may end later")
    parser.add_argument("--out", type=local_path, help="result file (default: benchmarks/results/gpu_CARD_DATE.json)")
    parser.add_argument("--work", type=local_path, help="folder of images and runs (default: build/acceptance)")
    arguments = parser.parse_args()
    facts = describe(arguments.cpu)
    card = "".join(letter if letter.isalnum() else "_" for letter in facts["card"].lower())
    day = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    path = arguments.out or ROOT / "benchmarks" / "results" / f"gpu_{card}_{day}.json"
    work = arguments.work or ROOT / "build" / f"acceptance_{card}"
    for folder in (path.parent, work):
        folder.mkdir(parents=True, exist_ok=True)
    chosen = list(parts(work, arguments.cpu, facts["gpu_bytes"]))
    try:
        document = run_all(chosen, path, facts, arguments.minutes)
    except KeyboardInterrupt:
        interrupts.report()
        return EXIT_INTERRUPTED
    failed = [name for name, record in document["parts"].items() if record["status"]]
    results = f"{len(document['parts'])} of {len(chosen)} parts have a result in {path}"
    print(f"{results}; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
