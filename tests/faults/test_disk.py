"""Full, limited and read-only disks: a warning, a retry at the next interval, and no older checkpoint lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from drawn_images import draw_folder
from ranks import ROOT
from tiny_run import command, logged

from shards.packing.pack import PackOptions, pack
from streamtrain.checkpoint.reader import read_weights

SCRIPT = Path(__file__).with_name("disk_trouble.py")
NAMESPACE = ("unshare", "--mount", "--map-root-user")
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "DS_ACCELERATOR": "cpu"}


def can_mount(folder: Path) -> bool:
    words = (*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", folder)
    try:
        return subprocess.run(words, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def run(*words: str | Path) -> str:
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_failed_write_is_logged_and_retried(tmp_path: Path) -> None:
    out = run(sys.executable, SCRIPT, tmp_path / "run", "limit")
    assert out.splitlines() == [
        "step 1: checkpoint saved",
        "step 2: checkpoint saved",
        "warning: the checkpoint of step 3 could not be written: File too large; the next attempt is at the next "
        "interval; the latest one is from step 2",
        "step 3: the checkpoint could not be written (File too large); the latest one is from step 2",
        "step 7: checkpoint saved",
        "['latest', 'step-000000007']",
    ]


def test_full_and_read_only_disks(tmp_path: Path) -> None:
    if not can_mount(tmp_path):
        pytest.skip("this process may not mount; the file-size limit is tested anyway")
    out = run(*NAMESPACE, sys.executable, SCRIPT, tmp_path / "run", "mount")
    status_lines = [line for line in out.splitlines() if not line.startswith("warning: ")]
    for line, expected in zip(status_lines, (
        r"step 1: checkpoint saved",
        r"step 2: checkpoint saved",
        r"step 3: the checkpoint could not be written \(No space left on device\); the latest one is from step 2",
        r"step 4: .*\(it needs 0\.00172 MB, and the disk has 0 MB left\); the latest one is from step 2",
        r"step 5: checkpoint saved",
        r"step 6: .*\(Read-only file system .*\); the latest one is from step 5",
        r"step 7: checkpoint saved",
        r"\['latest', 'step-000000007'\]",
    ), strict=True):  # fmt: skip
        assert re.fullmatch(expected, line), (line, expected)
    assert out.count("warning: the checkpoint of step") == 3


@pytest.mark.slow
def test_a_run_with_a_full_disk_finishes_and_reports_the_missing_checkpoint(tmp_path: Path) -> None:
    if not can_mount(tmp_path):
        pytest.skip("this process may not mount")
    pack(draw_folder(tmp_path / "images", 40), tmp_path / "set", PackOptions())
    words = {
        name: [sys.executable, *command(tmp_path / "set", tmp_path / name, "run.steps=6", "run.keep_last=1")]
        for name in ("straight", "broken")
    }
    run(*words["straight"])
    checkpoint = tmp_path / "straight/checkpoints/step-000000006"
    kilobytes = sum(path.stat().st_size for path in checkpoint.iterdir()) // 1000
    # first room for one checkpoint but not two, then for two
    script = f"""
        mkdir -p {tmp_path}/broken/checkpoints && cd {tmp_path}/broken
        touch .streamtrain.lock
        mount -t tmpfs -o size={kilobytes * 3 // 2}k tmpfs checkpoints
        {" ".join(f"'{word}'" for word in words["broken"])} > first.out 2> first.err
        echo "exit $?"
        mount -o remount,size={kilobytes * 3}k checkpoints
        {" ".join(f"'{word}'" for word in words["broken"])} > second.out 2> second.err
        echo "exit $?"
        cp -r checkpoints kept && umount checkpoints && mv kept/* checkpoints
    """
    assert run(*NAMESPACE, "sh", "-c", script) == "exit 2\nexit 0\n"
    error = (tmp_path / "broken/first.err").read_text()
    assert error.count("warning: the checkpoint of step") == 5
    assert "error: all steps are complete, but the checkpoint could not be written" in error.splitlines()[-1]
    assert "the latest one is from step 1" in error.splitlines()[-1]
    assert "resuming at step 1 from" in (tmp_path / "broken/second.out").read_text()
    assert logged(tmp_path / "broken") == logged(tmp_path / "straight")
    broken_weights, straight_weights = (read_weights(tmp_path / name) for name in ("broken", "straight"))
    assert all(bool((broken_weights[name] == value).all()) for name, value in straight_weights.items())
