"""Runs made by earlier code resume without any option."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drawn_images import draw_folder
from ranks import ROOT
from tiny_run import command, logged

from shards.packing.pack import PackOptions, pack

FIXTURE = ROOT / "tests" / "fixtures" / "run_eb5aab7"
# instructions that every x86-64 CPU has, so that results do not depend on the machine
INSTRUCTIONS = {
    "MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "1",
}  # fmt: skip
SETTINGS = (
    "run.steps=6", "run.checkpoint_every=3", "engine.cpu_kernels=false", "model.drop_path=0.25", "data.global_batch=8",
)  # fmt: skip


def train(words: list[str], folder: Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the training command in ``folder`` with the sources of ``root``."""
    environment = {**os.environ, **INSTRUCTIONS, "PYTHONPATH": str(root), "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_a_run_of_commit_eb5aab7_resumes_to_the_recorded_losses(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(FIXTURE, folder)
    done = train(command("set", Path("run"), *SETTINGS), folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming at step 3" in done.stdout + done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: resuming with other versions: ")]
    assert len(warnings) == 1 and "the checkpoint has 33bf0a08af6d" in warnings[0]
    (folder / "expected").mkdir()
    (folder / "expected.jsonl").rename(folder / "expected" / "metrics.jsonl")
    results, expected = logged(folder / "run"), logged(folder / "expected")
    assert list(results) == list(expected) == [1, 2, 3, 4, 5, 6]
    recorded = json.loads((FIXTURE / "run" / "environment.json").read_text())["program"]["torch"]
    for step in (4, 5, 6):
        if torch.__version__.partition("+")[0] == recorded:
            assert results[step] == expected[step]
        else:
            assert results[step] == pytest.approx(expected[step], rel=1e-4)


@pytest.mark.slow
def test_a_new_comment_in_the_code_does_not_prevent_resuming(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    for name in ("shards", "streamtrain", "configs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    pack(draw_folder(tmp_path / "images", 12), tmp_path / "set", PackOptions())

    def run(steps: int) -> subprocess.CompletedProcess[str]:
        words = command(tmp_path / "set", tmp_path / "run", f"run.steps={steps}")
        return train([str(root / "streamtrain" / "main.py"), *words[1:]], tmp_path, root)

    first = run(1)
    assert first.returncode == 0 and "other versions" not in first.stderr, first.stderr[-3000:]
    with open(root / "streamtrain" / "training" / "loop.py", "a") as file:
        file.write("# a comment\n")
    second = run(2)
    assert second.returncode == 0, second.stderr[-3000:]
    assert second.stderr.count("warning: resuming with other versions: code is ") == 1
    assert list(logged(tmp_path / "run")) == [1, 2]
