"""Continue a small network on other images, with and without the anchor, and measure kNN on old and new images.

A network is trained on some classes (set A) and continued on the others (set B), once with ``continue.yaml`` and once
with the recipe that trained it, as a user without this recipe would. All runs use the command line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from streamtrain.errors import StreamtrainError

ROOT = Path(__file__).resolve().parents[2]
TAGS = {
    "knn_a": "reference/knn_20", "knn_b": "eval/knn_20", "cka_a": "drift/reference/cka",
    "distance_a": "drift/reference/distance",
}  # fmt: skip
# the size of the network and of its images, for every run
NETWORK = (
    "model.preset=null", "model.patch_size=4", "model.dim=128", "model.depth=5", "model.num_heads=2",
    "model.drop_path=0.0", "crops.global_size=32", "crops.local_size=16", "crops.local_count=4",
    "crops.local_scale=[0.1, 0.4]", "crops.blur.sigma=[0.1, 0.5]", "engine.checkpointing=none",
    "monitor.tensorboard=false", "monitor.progress=false",
)  # fmt: skip
HEAD = "{prototypes: 1024, hidden: 512, bottleneck: 128}"
# for continue.yaml: warm-ups are shortened like the runs, temperatures suit the smaller bottleneck
ANCHORED = (
    f"objective.global_loss.head={HEAD}", f"objective.patch_loss.head={HEAD}", "model.layerscale=1.0",
    "data.micro_batch=32", "init.freeze_backbone_steps=50", "schedules.lr.warmup=25",
    "objective.student_temperature=0.0226", "schedules.teacher_temperature=0.0045", "evaluation.stop_if_below=null",
)  # fmt: skip


def run(
    images: Path | None, folder: Path, seeds: int, base_steps: int, steps: int, overrides: Sequence[str]
) -> dict[str, Any]:
    """Train, continue and evaluate; return accuracies in per cent, averaged over seeds, and the curves of each run.

    Args:
        images: a class folder with ``train`` and ``test``, or a tar file that contains one; None: drawn images.
        folder: for sets and runs; existing ones are used again.
        seeds: number of continued runs of each kind.
        overrides: further settings of the anchored runs.
    """
    sets = _make_sets(images, folder)
    base = folder / "base"
    _train("cifar10.yaml", sets["a"], base, base_steps, [*NETWORK, *_evaluation(sets, base_steps, "a")])
    exported = folder / "exported"
    if not exported.exists():
        _streamtrain("export", "--run", base, "--to", "safetensors", "--out", exported)
    start = {name: _accuracy(["--weights", exported], sets[name]) for name in ("a", "b")}
    result: dict[str, Any] = {f"start_knn_{name}": value for name, value in start.items()}
    kinds = {"anchored": ("continue.yaml", [*ANCHORED, *overrides]), "plain": ("cifar10.yaml", [])}
    curves = {}
    for kind, (recipe, given) in kinds.items():
        ends = []
        for seed in range(seeds):
            path = folder / f"{kind}-{seed}"
            settings = [*NETWORK, *_evaluation(sets, steps, "b", "a"), *given]
            settings += [f"init.weights={exported}", f"run.seed={seed}"]
            _train(recipe, sets["b"], path, steps, settings)
            curves[path.name] = _curve(path)
            ends.append({name: _accuracy(["--run", path], sets[name]) for name in ("a", "b")})
        for name in ("a", "b"):
            values = [end[name] for end in ends]
            result |= {f"{kind}_knn_{name}": mean(values), f"{kind}_knn_{name}_by_seed": values}
    (folder / "curves.json").write_text(json.dumps(curves, indent=1) + "\n")
    print(_table(result, seeds))
    return result | {"curves": curves}


def _make_sets(images: Path | None, folder: Path) -> dict[str, dict[str, Path]]:
    """Return the shard set, the training and the test images of the sets A and B; make them at the first call."""
    folder.mkdir(parents=True, exist_ok=True)
    if images is None:
        images = folder / "drawn"
        for name, count, seed in (("train", 6000, 0), ("test", 1500, 1)):
            if not (images / name).exists():
                script = ROOT / "tools" / "make_demo_images.py"
                _call(sys.executable, script, "--out", images / name, "--count", count, "--size", 40, "--seed", seed)
    elif images.is_file():
        if not (folder / "unpacked").exists():
            with tarfile.open(images) as tar:
                tar.extractall(folder / "unpacked", filter="data")
        images = next((path.parent for path in sorted(folder.glob("unpacked/**/train"))), folder)
    if not (images / "train").is_dir() or not (images / "test").is_dir():
        raise StreamtrainError(f"{images} has no folders train and test with one subfolder per class")
    classes = sorted(path.name for path in (images / "train").iterdir() if path.is_dir())
    num_first = round(0.6 * len(classes))
    sets = {}
    for name, chosen in (("a", classes[:num_first]), ("b", classes[num_first:])):
        paths = {part: folder / name / part for part in ("train", "test")}
        for part, path in paths.items():
            path.mkdir(parents=True, exist_ok=True)
            for each in chosen:
                if not (path / each).exists():
                    (path / each).symlink_to((images / part / each).resolve())
        paths["shards"] = folder / f"set-{name}"
        if not paths["shards"].exists():
            _streamtrain("pack", "--src", paths["train"], "--out", paths["shards"])
        sets[name] = paths
    return sets


def _evaluation(sets: dict[str, dict[str, Path]], steps: int, name: str, reference: str | None = None) -> list[str]:
    every = max(1, steps // 8)
    settings = [
        f"evaluation.train={sets[name]['train']}", f"evaluation.test={sets[name]['test']}", f"evaluation.every={every}",
        "evaluation.evaluators=[knn]", "evaluation.max_share=1.0", "evaluation.images=4000",
        f"run.checkpoint_every={every}",
    ]  # fmt: skip
    return settings + ([f"evaluation.reference={sets[reference]['train']}"] if reference is not None else [])


def _train(recipe: str, paths: dict[str, Path], run_dir: Path, steps: int, settings: Sequence[str]) -> None:
    given = [f"data.shards={paths['shards']}", f"run.dir={run_dir}", f"run.steps={steps}", *settings]
    _streamtrain("train", "--config", recipe, *given)


def _accuracy(network: Sequence[str | Path], paths: dict[str, Path]) -> float:
    """Return the kNN accuracy (k = 20) on all test images in per cent."""
    printed = _streamtrain("evaluate", "knn", *network, "--train", paths["train"], "--test", paths["test"], "--json")
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


def _table(result: dict[str, Any], seeds: int) -> str:
    lines = [f"kNN (%), mean of {seeds} seeds", "| network | set A | set B |", "|---|---|---|"]
    for name in ("start", "anchored", "plain"):
        lines.append(f"| {name} | {result[f'{name}_knn_a']:.1f} | {result[f'{name}_knn_b']:.1f} |")
    return "\n".join(lines)


def _streamtrain(*words: object) -> str:
    return _call(sys.executable, "-m", "streamtrain.cli.main", *words)


def _call(*words: object) -> str:
    done = subprocess.run(
        [*map(str, words)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    if done.returncode:
        raise StreamtrainError(f"{words[3]} failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    return done.stdout
