"""Packing, verification, training and evaluation accept the same images.

``STREAMTRAIN_IMAGES=FOLDER pytest -m slow tests/data/test_same_images_everywhere.py`` runs the test on a folder of your
own, with one class per subfolder.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from faults.fuzz_images import SAMPLES
from fork_server import run_forked
from ranks import ROOT
from tiny_run import command

from shards.reading.shard_set import ShardSet

MICRO_BATCH = 16


def run(*words: str | Path, timeout: float = 3600) -> subprocess.CompletedProcess[str]:
    return run_forked(words, {**os.environ, "DS_ACCELERATOR": "cpu"}, ROOT, timeout)


def use_everywhere(source: Path, folder: Path) -> int:
    """Pack, verify, train one epoch and evaluate; return the number of images; assert that all are used."""
    packed = run("tools/make_shards.py", "--src", source, "--out", folder / "set")
    assert packed.returncode == 0, packed.stderr
    verified = run("tools/verify_shards.py", folder / "set")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    count = ShardSet.open(folder / "set").num_samples
    steps = -(-count // MICRO_BATCH)
    trained = run(*command(
        folder / "set", folder / "run", f"run.steps={steps}", f"data.micro_batch={MICRO_BATCH}", "data.lanes=1",
        "run.checkpoint_every=0", "data.max_unusable_share=1", "crops.local_count=0", "evaluation.every=0",
    ))  # fmt: skip
    assert trained.returncode == 0, trained.stderr[-2000:]
    quarantine = folder / "run" / "quarantine.jsonl"
    assert not quarantine.exists() or not quarantine.read_text(), quarantine.read_text()
    evaluated = run("tools/evaluate.py", "knn", "--pixels", "--train", folder / "set", "--size", "16", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout.splitlines()[-1])
    assert "could not" not in evaluated.stderr
    return count


def test_an_image_of_each_kind(tmp_path: Path) -> None:
    for number, (name, content) in enumerate(SAMPLES.items()):
        for label in ("a", "b"):
            path = tmp_path / "images" / label / f"{number}.{name.split()[-1].replace('jpg_2000', 'jp2')}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    assert use_everywhere(tmp_path / "images", tmp_path) == 2 * len(SAMPLES) - 2  # pixels of float have no white


@pytest.mark.slow
def test_the_images_of_a_folder(tmp_path: Path) -> None:
    if "STREAMTRAIN_IMAGES" not in os.environ:
        pytest.skip("set STREAMTRAIN_IMAGES to a folder with class subfolders")
    print(use_everywhere(Path(os.environ["STREAMTRAIN_IMAGES"]), tmp_path), "images")
