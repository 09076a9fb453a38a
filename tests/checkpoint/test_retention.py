"""The best checkpoint is recorded and kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamtrain.checkpoint.retention import best_value, finish_removal, partial_of, prune, publish, write_best
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


INVALID = [
    b"", b"[]", b"{}", b'{"step": "20", "metric": "knn_20", "value": 0.75}', b"[" * 200_000, b"\xff" * 300,
    b'{"step": 20, "metric": "knn_20", "value": NaN}', b'{"step": 20, "metric": "knn_20", "value": 1e999}',
]  # fmt: skip


@pytest.mark.parametrize("content", INVALID)
def test_invalid_file_means_no_best_checkpoint(run: Path, content: bytes) -> None:
    (run / BEST_NAME).write_bytes(content)
    assert best_value(run, "knn_20", 40) is None


def test_best_checkpoint_is_kept_with_the_newest(run: Path) -> None:
    prune(run, RunConfig(keep_last=1))
    assert saved_steps(run) == [20, 40]


def test_of_a_linked_checkpoint_only_the_link_is_removed(run: Path) -> None:
    moved = run / "another_disk"
    step_folder(run, 10).rename(moved)
    (moved / "state.json").touch()
    step_folder(run, 10).symlink_to(moved)
    # leftovers of an earlier removal, one of them a link
    step_folder(run, 10).with_name(".step-000000010.removed").symlink_to(moved)
    step_folder(run, 30).with_name(".step-000000030.removed").mkdir()
    prune(run, RunConfig(keep_last=1))
    assert saved_steps(run) == [20, 40] and (moved / "state.json").exists()
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_a_step_of_an_earlier_life_is_replaced(kind: str, run: Path) -> None:
    folder, target = step_folder(run, 40), run / "target"
    target.mkdir()
    (target / "state.json").write_text("precious")
    folder.rmdir()
    if kind == "folder":
        folder.mkdir()
        (folder / "old").touch()
    elif kind == "link":
        folder.symlink_to(target)
    else:
        folder.touch()
    partial_of(folder).mkdir()
    (partial_of(folder) / "new").touch()
    publish(partial_of(folder), folder)
    finish_removal(folder)
    assert [path.name for path in folder.iterdir()] == ["new"] and not list(folder.parent.glob(".*"))
    assert (target / "state.json").read_text() == "precious"
