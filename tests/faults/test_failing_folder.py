"""A full or failing disk under the whole run directory: training continues, and afterwards nothing is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from drawn_images import overwrite, packed_set
from ranks import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import command, logged

SCRIPT = Path(__file__).with_name("failing_folder.py")
STEPS = 8
EVERYTHING = (
    f"run.steps={STEPS}", "monitor.tensorboard=true", "monitor.panel_every=2", "monitor.histogram_every=2",
    "evaluation.every=2", "evaluation.max_share=1.0", "evaluation.best=knn_20", "data.max_unusable_share=1.0",
    "monitor.profile={start: 3, steps: 1}", "evaluation.images=20",
)  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a good disk, beside its set, which has damaged images."""
    folder = tmp_path_factory.mktemp("straight")
    shard_set = packed_set(folder, 40, ("a", "b"))
    for sample in range(0, shard_set.sizes[0], 2):
        overwrite(shard_set, 0, sample, b"damage", skip=50)
    train(folder, "ENOSPC", STEPS + 1, STEPS + 1, folder / "run")
    return folder


def train(folder: Path, error: str, first: int, last: int, run_dir: Path) -> str:
    words = command(folder / "set", run_dir, *EVERYTHING)
    # modules imported before the script have names of functions that it replaces
    ((status, _, stderr),) = run_ranks([SCRIPT, error, str(first), str(last), *words[1:]], 1, fresh=True)
    assert status == 0, stderr[-3000:]
    assert "Traceback" not in stderr
    return stderr


def quarantined(run_dir: Path) -> set[tuple[int, str, int]]:
    # a line torn by the failure may remain, but none is added to it
    lines = [line for line in (run_dir / "quarantine.jsonl").read_text().splitlines() if line.endswith("}")]
    entries = map(json.loads, lines)
    return {(entry["slot"], entry["shard"], entry["index"]) for entry in entries}


@pytest.mark.parametrize(
    ("error", "first"),
    [
        pytest.param("ENOSPC", 0, marks=pytest.mark.slow),
        pytest.param("ENOSPC", 3, marks=pytest.mark.slow),
        pytest.param("EIO", 0, marks=pytest.mark.slow),
        ("EIO", 3),
    ],
)
def test_a_disk_that_fails_for_a_while(straight: Path, tmp_path: Path, error: str, first: int) -> None:
    run_dir = tmp_path / "run"
    stderr = train(straight, error, first, 6, run_dir)
    assert stderr.count("metrics.jsonl cannot be written") == 1
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    assert logged(run_dir) == logged(straight / "run")
    assert quarantined(run_dir) == quarantined(straight / "run") != set()
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/total")] == list(range(1, STEPS + 1))
    assert (run_dir / "config.yaml").is_file() and (run_dir / "environment.json").is_file()
    assert (run_dir / "checkpoints" / f"step-{STEPS:09d}").is_dir()


def test_a_run_that_resumes_on_a_full_disk(straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight / "run", run_dir)
    for step in range(4, STEPS + 1):
        shutil.rmtree(run_dir / "checkpoints" / f"step-{step:09d}", ignore_errors=True)
    # metrics ahead of the checkpoint, and a torn line
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "slo')
    train(straight, "ENOSPC", 0, 6, run_dir)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    assert logged(run_dir) == logged(straight / "run")
