"""Creation and lock of the run directory, and the notes before the first step."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from streamtrain.config.load import build
from streamtrain.config.tree import Config
from streamtrain.errors import ConfigError, StreamtrainError
from streamtrain.run.directory import describe_run, log_start_notes, make_run_dir, step_folder
from streamtrain.run.lock import run_lock


def test_only_an_empty_directory_or_a_run_is_accepted(tmp_path: Path) -> None:
    for name in ("STOP", "job-7.out", "train.log", ".DS_Store"):
        (tmp_path / name).touch()
    make_run_dir(tmp_path, 0)
    for name in ("thesis.txt", "config.yaml", "environment.json", "metrics.jsonl"):
        (tmp_path / name).write_text("precious")
        with pytest.raises(StreamtrainError, match=f"such as {name}"):
            make_run_dir(tmp_path, 0)
        (tmp_path / name).rename(tmp_path / ".hidden")
    (tmp_path / "thesis.txt").touch()
    step_folder(tmp_path, 3).mkdir(parents=True)
    make_run_dir(tmp_path, 0)
    step_folder(tmp_path, 3).rename(tmp_path / "checkpoints" / "3")
    with pytest.raises(StreamtrainError, match="such as checkpoints"):
        make_run_dir(tmp_path, 0)
    describe_run(tmp_path, build({}), 1, {"device": "cpu", "dtype": "fp32"})
    make_run_dir(tmp_path, 0)


def test_a_directory_that_was_locked_by_a_run_is_accepted(tmp_path: Path) -> None:
    with run_lock(tmp_path, 0):
        with pytest.raises(StreamtrainError, match="another run is writing"), run_lock(tmp_path, 0):
            pass
        with run_lock(tmp_path, 1):
            (tmp_path / "moments").mkdir()
    make_run_dir(tmp_path, 0)
    with run_lock(tmp_path, 0):
        pass


def notes(config: Config, world_size: int, caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        log_start_notes(config, world_size)
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_start_notes_warn_of_small_koleo_groups(caplog: pytest.LogCaptureFixture) -> None:
    alone = build({"data": {"micro_batch": 2, "global_batch": 16}})
    ((level, warning),) = notes(alone, 4, caplog)
    assert level == "WARNING" and warning.startswith("KoLeo") and "2 sample(s)" in warning
    together = build({"data": {"micro_batch": 2}, "objective": {"koleo": {"distributed": True}}})
    assert len(notes(together, 4, caplog)) == 0 and len(notes(together, 2, caplog)) == 1
    off = build({"data": {"micro_batch": 1}, "objective": {"koleo": {"weight": 0}}})
    assert len(notes(off, 1, caplog)) == 0


def test_half_a_scaling_of_the_learning_rate_is_refused() -> None:
    for half in ({"lr_scaling": "sqrt"}, {"lr_reference_batch": 64}, {"clip_per": "module", "clip": 0}):
        with pytest.raises(ConfigError):
            build({"optim": half})
