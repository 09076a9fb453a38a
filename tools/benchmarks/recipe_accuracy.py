"""Train a recipe with several seeds, and compare kNN and a linear layer with pixels and the untrained network."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.commands import children_cpu_seconds, find_class_folders, streamtrain

# 97.5 % quantiles of Student's t distribution for 1, 2, ... degrees of freedom; 1.96 for more
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
TASKS = {"knn": "knn_20", "linear": "linear"}


def run(recipe: str, images: Path, folder: Path, seeds: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Train and evaluate; return accuracies in per cent by network and seed, and CPU hours of each training.

    Args:
        images: class folders in ``train`` and ``test``, or a tar file that contains them.
        folder: for sets and runs; finished runs are used again.
        seeds: number of runs.
        overrides: further settings of all runs.
    """
    images = find_class_folders(images, folder)
    sets = {part: folder / f"set-{part}" for part in ("train", "test")}
    for part, shards in sets.items():
        streamtrain("pack", "--src", images / part, "--out", shards)
    given = [f"data.shards={sets['train']}", "monitor.progress=false", *overrides]
    scores: dict[str, Any] = {"pixels": _evaluate(["--pixels"], sets)}
    cpu_hours = []
    runs = []
    for seed in range(seeds):
        path = folder / f"run-{seed}"
        cpu_hours.append(_train(path, ["--config", recipe, f"run.dir={path}", f"run.seed={seed}", *given]))
        runs.append(_evaluate(["--run", path], sets))
        if seed == 0:
            untrained = ["--untrained", "--config", path / "config.yaml"]
            scores["untrained"] = _evaluate(untrained, sets)
        print(f"seed {seed}: {runs[-1]}, {cpu_hours[-1]:.2f} CPU hours", file=sys.stderr, flush=True)
    scores["trained"] = {task: [run[task] for run in runs] for task in TASKS}
    minutes = round(60 * statistics.mean(cpu_hours))
    result: dict[str, Any] = {
        "title": f"{recipe}: accuracy on test images",
        "n": f"{seeds} seeds; {_count(images / 'train'):,} training and {_count(images / 'test'):,} test images",
        "spread": "±: 95 % confidence interval of the mean over seeds (Student's t)",
        "columns": [
            {"name": "network"}, {"name": "kNN, k = 20", "unit": "%"}, {"name": "linear", "unit": "%"},
            {"name": "CPU minutes", "decimals": 0},
        ],
        "rows": [
            *([name, *(round(scores[name][task], 1) for task in TASKS), None] for name in ("pixels", "untrained")),
            ["trained", *(_interval(scores["trained"][task]) for task in TASKS), minutes],
        ],
        "recipe": recipe, "cpu_hours": cpu_hours, "accuracies": scores,
    }  # fmt: skip
    print(" | ".join(column["name"] for column in result["columns"]))
    for row in result["rows"]:
        print(" | ".join("" if value is None else str(value) for value in row))
    return result


def _count(folder: Path) -> int:
    return sum(1 for path in folder.rglob("*") if path.is_file())


def _interval(values: Sequence[float]) -> str:
    """Return the mean and the 95 % confidence interval of the mean over seeds."""
    mean = f"{statistics.mean(values):.1f}"
    if len(values) < 2:
        return mean
    quantile = T[len(values) - 2] if len(values) - 2 < len(T) else 1.96
    return f"{mean} ± {quantile * statistics.stdev(values) / len(values) ** 0.5:.1f}"


def _train(path: Path, words: Sequence[object]) -> float:
    """Train, resuming an interrupted run; return its CPU hours, which are kept in a file beside the run."""
    record = path.with_name(f"{path.name}-cpu-seconds.json")
    spent = json.loads(record.read_text()) if record.exists() else {"seconds": 0.0, "done": False}
    if not spent["done"]:
        before = children_cpu_seconds()
        try:
            streamtrain("train", *words)
            spent["done"] = True
        finally:
            spent["seconds"] += children_cpu_seconds() - before
            record.write_text(json.dumps(spent))
    return float(spent["seconds"]) / 3600


def _evaluate(network: Sequence[object], sets: dict[str, Path]) -> dict[str, float]:
    """Return the accuracies on all test images in per cent."""
    accuracies = {}
    for task, key in TASKS.items():
        given = ["--train", sets["train"], "--test", sets["test"], "--json"]
        printed = streamtrain("evaluate", task, *network, *given)
        accuracies[task] = 100.0 * float(json.loads(printed.splitlines()[-1])[key])
    return accuracies
