"""Continue a small network on images of another kind, and measure kNN on the old and the new images.

A network is trained on drawn images (set A) and continued on other images (set B): with ``continue.yaml``, with
``continue_lora.yaml``, with these recipes but no anchor, and with the recipe of the first training. All runs use the
command line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.commands import ROOT, call, find_class_folders, streamtrain

# values of an evaluation by their names in curves
TAGS = {
    "knn_a": "reference/knn_20", "knn_b": "eval/knn_20", "cka_a": "drift/reference/cka",
    "distance_a": "drift/reference/distance",
}  # fmt: skip
# The network of quickstart.yaml, its crops and its heads, for the recipes that continue it. The temperatures fit
# prototypes of 64 numbers; the warm-up and the teacher's average are shortened like the runs.
SMALL = (
    "model.preset=null", "model.patch_size=8", "model.dim=128", "model.depth=4", "model.num_heads=2",
    "model.layerscale=1.0", "crops.global_size=48", "crops.local_size=24", "crops.local_count=4",
    "crops.local_scale=[0.1, 0.4]",
    "crops.blur={sigma: [0.1, 0.8], global_probability: [0.2, 0.1], local_probability: 0.1}",
    "objective.global_loss.head={prototypes: 128, hidden: 256, bottleneck: 64}",
    "objective.patch_loss={weight: 0.5, head: {prototypes: 128, hidden: 256, bottleneck: 64}}",
    "objective.student_temperature=0.016", "schedules.teacher_temperature=0.003", "data.micro_batch=32",
    "engine.checkpointing=none", "schedules.lr.warmup=30", "schedules.momentum.peak=0.95",
    "evaluation.stop_if_below=null",
)  # fmt: skip
LR = "schedules.lr.peak=1e-3"
LORA_LR = "schedules.lr.peak=2e-3"
NO_ANCHOR = "objective.anchor.weight=0"
# the temperatures of quickstart.yaml assume prototypes of constant norm
FROZEN_PROTOTYPES = "schedules.freeze_last_layer=1000000"
# name of each way: its recipe and settings
WAYS: dict[str, tuple[str, Sequence[str]]] = {
    "anchor": ("continue.yaml", (*SMALL, LR)),
    "LoRA and anchor": ("continue_lora.yaml", (*SMALL, LORA_LR)),
    "LoRA": ("continue_lora.yaml", (*SMALL, LORA_LR, NO_ANCHOR)),
    "no anchor": ("continue.yaml", (*SMALL, LR, NO_ANCHOR)),
    "first recipe": ("quickstart.yaml", (FROZEN_PROTOTYPES,)),
}


def run(
    images: Path, folder: Path, seeds: int, base_steps: int, steps: int, overrides: Sequence[str]
) -> dict[str, Any]:
    """Train, continue and evaluate; return accuracies in per cent by way and seed, and the curves of each run.

    Args:
        images: set B: a class folder with ``train`` and ``test``, or a tar file that contains one.
        folder: for sets and runs; existing ones are used again.
        seeds: number of continued runs of each way.
        base_steps: length of the first training, and ``steps`` of the continued ones.
        overrides: further settings of all runs.
    """
    sets = _make_sets(images, folder)
    common = ["monitor.tensorboard=false", "monitor.progress=false", *overrides]
    base, exported = folder / "base", folder / "exported"
    if not exported.exists():
        _train("quickstart.yaml", sets["a"], base, base_steps, [FROZEN_PROTOTYPES, *common, "evaluation.every=0"])
        streamtrain("export", "--run", base, "--to", "safetensors", "--out", exported)
    result: dict[str, Any] = {"start": {name: [_accuracy(["--weights", exported], sets[name])] for name in sets}}
    curves = {}
    for way, (recipe, settings) in WAYS.items():
        result[way] = {name: [] for name in sets}
        for seed in range(seeds):
            path = folder / f"{way.replace(' ', '_')}-{seed}"
            given = [*settings, *_evaluation(sets, steps), f"init.weights={exported}", f"run.seed={seed}", *common]
            _train(recipe, sets["b"], path, steps, given)
            curves[path.name] = _curve(path)
            for name in sets:
                result[way][name].append(_accuracy(["--run", path], sets[name]))
    (folder / "curves.json").write_text(json.dumps(curves, indent=1) + "\n")
    print(_table(result))
    return {"accuracies": result, "curves": curves}


def _make_sets(images: Path, folder: Path) -> dict[str, dict[str, Path]]:
    """Return the shard set, the training and the test images of the sets A and B; make them at the first call."""
    images = find_class_folders(images, folder)
    drawn = folder / "drawn"
    for seed, (name, count) in enumerate((("train", 4800), ("test", 3000))):
        script = ROOT / "tools" / "make_demo_images.py"
        call(sys.executable, script, "--out", drawn / name, "--count", count, "--size", 64, "--seed", seed)
    sets = {}
    for name, path in (("a", drawn), ("b", images)):
        sets[name] = {"train": path / "train", "test": path / "test", "shards": folder / f"set-{name}"}
        streamtrain("pack", "--src", path / "train", "--out", sets[name]["shards"])
    return sets


def _evaluation(sets: dict[str, dict[str, Path]], steps: int) -> list[str]:
    every = max(1, steps // 4)
    return [
        f"evaluation.train={sets['b']['train']}", f"evaluation.test={sets['b']['test']}", f"evaluation.every={every}",
        f"evaluation.reference={sets['a']['train']}", "evaluation.evaluators=[knn]", "evaluation.max_share=1.0",
        "evaluation.images=4000", f"run.checkpoint_every={every}",
    ]  # fmt: skip


def _train(recipe: str, paths: dict[str, Path], run_dir: Path, steps: int, settings: Sequence[str]) -> None:
    given = [f"data.shards={paths['shards']}", f"run.dir={run_dir}", f"run.steps={steps}", *settings]
    streamtrain("train", "--config", recipe, *given)


def _accuracy(network: Sequence[str | Path], paths: dict[str, Path]) -> float:
    """Return the kNN accuracy (k = 20) on all test images in per cent."""
    printed = streamtrain("evaluate", "knn", *network, "--train", paths["train"], "--test", paths["test"], "--json")
    return 100.0 * float(json.loads(printed.splitlines()[-1])["knn_20"])


def _curve(run_dir: Path) -> dict[str, list[float]]:
    """Return the evaluations of a run by step."""
    start = json.loads((run_dir / "baselines.json").read_text())["start"]
    curve: dict[str, list[float]] = {"step": [0], "cka_a": [1.0], "distance_a": [0.0]}
    curve |= {name: [start[TAGS[name]]] for name in ("knn_a", "knn_b")}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if TAGS["knn_a"] in record:
            curve["step"].append(record["step"])
            for name, tag in TAGS.items():
                curve[name].append(record[tag])
    return curve


def _table(result: dict[str, dict[str, list[float]]]) -> str:
    start = {name: values[0] for name, values in result["start"].items()}
    lines = ["| way | kNN on A (%) | change | kNN on B (%) | change |", "|---|---|---|---|---|"]
    lines.append(f"| start | {start['a']:.1f} | | {start['b']:.1f} | |")
    for way in WAYS:
        cells = []
        for name in ("a", "b"):
            values = result[way][name]
            cells += [
                f"{mean(values):.1f}",
                f"{mean(values) - start[name]:+.1f} ({', '.join(f'{value - start[name]:+.1f}' for value in values)})",
            ]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)
