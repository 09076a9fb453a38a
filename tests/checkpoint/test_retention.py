"""The best checkpoint is recorded and kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamtrain.checkpoint.retention import best_value, prune, write_best
from streamtrain.config.run import RunConfig
from streamtrain.run.directory import BEST_NAME, saved_steps, step_folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of four steps; the second is the best."""
    for step in (10, 20, 30, 40):
        step_folder(tmp_path, step).mkdir(parents=True)
    write_best(tmp_path, {"step": 20, "metric": "knn_20", "value": 0.75})
    return tmp_path


def test_best_value_needs_an_existing_checkpoint(run: Path) -> None:
    assert best_value(run, "knn_20", 40) == best_value(run, "knn_20", 20) == 0.75
    # another metric; a later step than the resumed one; a checkpoint that was never written or is damaged
    assert best_value(run, "linear", 40) is None
    assert best_value(run, "knn_20", 19) is None
    step_folder(run, 20).rename(run / "checkpoints" / "damaged-step-000000020")
    assert best_value(run, "knn_20", 40) is None


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"step": "20", "metric": "knn_20", "value": 0.75}'])
def test_invalid_file_means_no_best_checkpoint(run: Path, content: bytes) -> None:
    (run / BEST_NAME).write_bytes(content)
    assert best_value(run, "knn_20", 40) is None


def test_best_checkpoint_is_kept_with_the_newest(run: Path) -> None:
    prune(run, RunConfig(keep_last=1))
    assert saved_steps(run) == [20, 40]
