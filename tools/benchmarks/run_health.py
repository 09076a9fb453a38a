"""Train small networks with and without faults, and compare the verdict on each run with its fault.

Recipes, images and settings alternate with the fault and the seed. The runs with the default seeds set no bound. All
runs use the command line, one at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.faulty_images import write_images
from streamtrain.config.load import load_config, read_resolved
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.health import judge_health
from streamtrain.evaluation.uncertainty import accuracy_margin
from streamtrain.reporting.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ("quickstart.yaml", "photos.yaml", "cifar10.yaml")
# a small network, small and few crops, a short warm-up and many measurements, because the runs take seconds
COMMON = (
    "model.dim=64", "model.depth=3", "model.num_heads=1", "model.patch_size=8", "crops.global_size=32",
    "crops.local_size=16", "crops.local_count=2", "objective.global_loss.head.prototypes=128",
    "objective.patch_loss.head.prototypes=128", "schedules.lr.warmup=10", "monitor.collapse.every=4",
    "monitor.tensorboard=false", "monitor.progress=false", "monitor.panel_every=0", "evaluation.every=0",
    "evaluation.best=null", "run.checkpoint_every=1000000",
)  # fmt: skip
# With this momentum, the centre stays at 0.
_NO_CENTRE = ("objective.centering=softmax", "objective.center_momentum=0.9999999")
# by fault: the right verdict, the images, and settings that alternate; {lr} and {temperature} are the recipe's
FAULTS: dict[str, tuple[str, str, Sequence[Sequence[str]]]] = {
    "none": ("healthy", "good", ((),)),
    "none, other seed": ("healthy", "good", ((),)),
    "learning rate x 30": ("learning rate", "good", (("schedules.lr.peak={lr}*30",),)),
    "temperature 1": (
        "entropy collapse", "good",
        (("schedules.teacher_temperature=1.0",),
         ("schedules.teacher_temperature=1.0", "objective.student_temperature=1.0")),
    ),
    "features of few dimensions": (
        "rank collapse", "good",
        (("model.factory=benchmarks.low_rank_backbone:two",), ("model.factory=benchmarks.low_rank_backbone:four",)),
    ),
    "no centring": ("entropy collapse", "good", (_NO_CENTRE,)),
    "temperature warm-up": (
        "schedule", "good",
        (("schedules.teacher_temperature={{start: {temperature}*0.5, peak: {temperature}*2.5, warmup: {steps}}}",),),
    ),
    "shuffled pixels": ("inputs", "shuffled", ((),)),
    "equal images": ("inputs", "equal", ((),)),
    "wrong normalisation": (
        "inputs", "good",
        (("crops.mean=[0, 0, 0]", "crops.std=[0.0039, 0.0039, 0.0039]"),
         ("crops.mean=[123.7, 116.3, 103.5]", "crops.std=[58.4, 57.1, 57.4]"),
         ("crops.mean=[0, 0, 0]", "crops.std=[1, 1, 1]")),
    ),
    "blank images": ("inputs", "blank", ((),)),
}  # fmt: skip


def run(
    images: Path, folder: Path, runs: int, first_seed: int, steps: int, overrides: Sequence[str],
    faults: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Train, judge and count; return the confusion matrix by fault, the share that is right, and each run.

    Args:
        images: photographs: a class folder, or a tar file that contains one named ``train``.
        folder: for sets and runs; existing ones are used again.
        runs: number of runs; the faults take turns.
        first_seed: seed of the first run, from which the other seeds count up.
        steps: of each run.
        overrides: further settings of all runs.
        faults: of ``FAULTS``; default: all.
    """
    faults = faults or list(FAULTS)
    if unknown := [fault for fault in faults if fault not in FAULTS]:
        raise StreamtrainError(f"there is no fault {unknown[0]!r}; choose among {', '.join(FAULTS)}")
    sources = _sources(images, folder)
    rows = []
    for index in range(runs):
        fault = faults[index % len(faults)]
        expected, kind, choices = FAULTS[fault]
        turn = index // len(faults) + first_seed
        recipe, source = RECIPES[(turn + index) % len(RECIPES)], list(sources)[index // 2 % len(sources)]
        shards = _pack(folder, source, sources[source], kind)
        given = [_fill(text, recipe, steps) for text in choices[turn % len(choices)]]
        path = folder / f"run-{first_seed + index}-{fault.replace(' ', '_')}"
        _train(path, ["--config", recipe, f"data.shards={shards}", f"run.dir={path}", f"run.steps={steps}",
                      f"run.seed={first_seed + index}", *COMMON, *given, *overrides])  # fmt: skip
        finding = judge_health(list(read_metrics(path / "metrics.jsonl")), read_resolved(path))
        rows.append(
            {"fault": fault, "recipe": recipe, "images": source, "seed": first_seed + index, "settings": given,
             "expected": expected, "verdict": finding.verdict, "text": f"{finding.title}. {finding.text}"}
        )  # fmt: skip
        print(f"{index + 1}/{runs} {fault}: {finding.verdict} ({recipe}, {source})", file=sys.stderr, flush=True)
    right = sum(row["expected"] == row["verdict"] for row in rows)
    matrix = {fault: dict(Counter(row["verdict"] for row in rows if row["fault"] == fault)) for fault in faults}
    return {
        "runs": runs, "right": right, "share": right / runs, "margin": accuracy_margin(right / runs, runs),
        "matrix": matrix, "of_runs": rows,
    }  # fmt: skip


def _sources(images: Path, folder: Path) -> dict[str, Path]:
    """Return class folders of drawn images and of the photographs; make them at the first call."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = folder / "drawn"
    script = ROOT / "tools" / "make_demo_images.py"
    subprocess.run([sys.executable, script, "--out", drawn, "--count", "1000", "--size", "64"], check=True,
                   capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    if images.is_file():
        if not (folder / "unpacked").exists():
            with tarfile.open(images) as tar:
                tar.extractall(folder / "unpacked", filter="data")
        images = next((path for path in sorted(folder.glob("unpacked/**/train"))), folder)
    if not any(path.is_dir() for path in images.iterdir()):
        raise StreamtrainError(f"{images} has no subfolder per class")
    return {"drawn": drawn, "photographs": images}


def _pack(folder: Path, source: str, images: Path, kind: str) -> Path:
    shards = folder / f"set-{source}-{kind}"
    if not shards.exists():
        write_images(images, folder / f"images-{source}-{kind}", kind, 1000)
        _call(folder / "pack.log", ["pack", "--src", str(folder / f"images-{source}-{kind}"), "--out", str(shards)])
    return shards


def _fill(text: str, recipe: str, steps: int) -> str:
    """Return a setting with the values of a recipe, times the factor after them."""
    if "{" not in text:
        return text
    schedules = load_config(recipe, ["run.steps=100", "data.shards=none"]).schedules
    for name, value in (("lr", schedules.lr.peak), ("temperature", schedules.teacher_temperature.peak)):
        for factor in (30, 2.5, 0.5):
            text = text.replace(f"{{{name}}}*{factor}", f"{value * factor:.6g}")
    return text.replace("{steps}", str(steps)).replace("{{", "{").replace("}}", "}")


def _train(path: Path, words: Sequence[str]) -> None:
    """Train unless an earlier call has finished it."""
    if not (path / "checkpoints").exists():
        shutil.rmtree(path, ignore_errors=True)
        _call(path.with_name(f"{path.name}.log"), ["train", *words])


def _call(log: Path, words: Sequence[str]) -> None:
    """Run a command line in a fork of a process that has imported the libraries, which saves their import."""
    context = multiprocessing.get_context("forkserver")
    # not this package: in the server, its name is still the folder of results
    context.set_forkserver_preload(["torch", "deepspeed", "streamtrain.training.loop"])
    process = context.Process(target=_main, args=(log, words))
    process.start()
    process.join()
    if process.exitcode:
        last = (log.read_text().strip().splitlines() or ["no message"])[-1]
        raise StreamtrainError(f"{words[0]} failed: {last}")


def _main(log: Path, words: Sequence[str]) -> None:
    from streamtrain.cli.main import main

    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["streamtrain", *words]
    sys.exit(main())
