"""A finished or unfinished run directory in any condition: a start ends with 0 or 2, or trains, with one line."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
import time
import types
from collections.abc import Collection
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from drawn_images import packed_set
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import ROOT, run_ranks, start_ranks
from tiny_run import command

import streamtrain.main
from streamtrain import main
from streamtrain.checkpoint.reader import open_checkpoint
from streamtrain.checkpoint.retention import best_value, remove_leftovers
from streamtrain.config.tree import Config
from streamtrain.errors import CheckpointError
from streamtrain.run.directory import describe_run, step_folder
from streamtrain.run.lock import LOCK_NAME

FIXTURE = ROOT / "tests" / "fixtures" / "run_eb5aab7"
# the settings of the recorded run
SETTINGS = ("run.checkpoint_every=3", "engine.cpu_kernels=false", "model.drop_path=0.25", "data.global_batch=8")
CHECKPOINT = "checkpoints/step-000000003"
TRAINS = -1
NAMES = (
    "config.yaml", "environment.json", "best.json", LOCK_NAME, ".config.yaml.partial", "checkpoints/latest",
    f"{CHECKPOINT}/manifest.json", f"{CHECKPOINT}/state.json",
)  # fmt: skip
HOSTILE = [b"", b"\0", b"[" * 100_000, b"1e999", b'{"step": 3, "metric": "a", "value": NaN}', b"\xff\xfe[\0", b"{}"]


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank without a launcher; beyond the checks, a start only reads the run directory."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(streamtrain.main, "choose_accelerator", lambda *_: "cpu")
    # the loop imports DeepSpeed
    monkeypatch.setitem(sys.modules, "streamtrain.training.loop", _Loop("loop"))


class _Loop(types.ModuleType):
    @staticmethod
    def dry_run(*_: object) -> int:
        return 0

    @staticmethod
    def train(
        config: Config, launch: object, shard_set: object, resume_from: object, accepted: Collection[str], moved: object
    ) -> int:
        run_dir = Path(config.run.dir)
        with open_checkpoint(step_folder(run_dir, 3)) as reader:
            assert reader.step == 3
        best_value(run_dir, "a", 3)
        with suppress(OSError):  # as the observer StartFiles
            describe_run(run_dir, config, 1, {})
        return TRAINS


def start(folder: Path, *overrides: str, options: tuple[str, ...] = ()) -> tuple[int, list[str]]:
    """Start the run of a copy of the fixture in this process; return the exit status and the log of this rank."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(handler.format(record))  # type: ignore[method-assign]
    words = command(folder / "set", folder / "run", *SETTINGS, *overrides)[1:]
    with _arguments("main.py", *words, *options):
        arguments = streamtrain.main.parse_arguments()
        original, streamtrain.main.configure_logging = streamtrain.main.configure_logging, lambda *_: None
        logger = logging.getLogger("streamtrain")
        level, propagate = logger.level, logger.propagate
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        try:
            return streamtrain.main.train_rank(arguments), lines
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
            streamtrain.main.configure_logging = original


@contextmanager
def _arguments(*words: str) -> Any:
    before, sys.argv = sys.argv, list(words)
    try:
        yield
    finally:
        sys.argv = before


def copy_fixture(folder: Path) -> Path:
    shutil.copytree(FIXTURE, folder)
    return folder


def test_a_finished_run_is_compared(tmp_path: Path) -> None:
    folder = copy_fixture(tmp_path / "run")
    leftover = folder / "run" / "checkpoints" / ".latest.partial"
    leftover.touch()
    for steps in (3, 2):
        code, lines = start(folder, f"run.steps={steps}")
        assert code == 0 and "already complete: 3 steps" in lines[-1]
        # of a run that was killed while it wrote the last checkpoint
        assert not leftover.exists()
    assert start(folder, "run.steps=6")[0] == TRAINS
    for override, message in {
        "run.seed=7": "run.seed is 7, the checkpoint has 0; restore them, or set run.dir",
        "model.depth=3": "model.depth is 3",
        "data.window=3": "data.window is 3",
        "schedules.lr=1e-3": "add --accept schedules.lr",
    }.items():
        code, lines = start(folder, "run.steps=3", override)
        assert code == 2 and message in lines[-1], lines
    code, lines = start(folder, "run.steps=3", "schedules.lr=1e-3", options=("--accept", "schedules.lr.peak"))
    assert code == 0 and "already complete" in lines[-1]


def test_a_finished_run_compares_its_images_unless_they_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_fixture(tmp_path / "run")
    other = packed_set(tmp_path / "other", 11).path
    code, lines = start(folder, "run.steps=3", f"data.shards={other}")
    assert code == 2 and "digest was" in lines[-1]
    code, lines = start(folder, "run.steps=3", f"data.shards={tmp_path / 'missing'}")
    assert code == 2 and "no shard set at" in lines[-1]
    # the recorded set may be deleted once the run is complete
    monkeypatch.chdir(folder)
    shutil.rmtree(folder / "set")
    code, lines = start(folder, "run.steps=3", "data.shards=set")
    assert code == 0 and "already complete" in lines[-1]
    assert start(folder, "run.steps=6", "data.shards=set")[0] == 2


def test_a_renamed_checkpoint_is_an_error(tmp_path: Path) -> None:
    folder = copy_fixture(tmp_path / "run")
    renamed = step_folder(folder / "run", 20)
    step_folder(folder / "run", 3).rename(renamed)
    code, lines = start(folder, "run.steps=30")
    assert code == 2 and "has step 3; rename it to step-000000003" in lines[-1]
    with pytest.raises(CheckpointError, match="was renamed"), open_checkpoint(renamed):
        pass


@pytest.mark.parametrize("name", ["metrics.jsonl", "quarantine.jsonl", "tensorboard", "checkpoints", "snapshots"])
def test_a_run_does_not_write_through_a_link(name: str, tmp_path: Path) -> None:
    folder = copy_fixture(tmp_path / "run")
    path, target = folder / "run" / name, tmp_path / "target"
    if path.exists():
        path.rename(target)
    path.symlink_to(target)
    code, lines = start(folder, "run.steps=6")
    assert code == 2 and f"{path} is a link to {target}" in lines[-1]
    # a complete run writes nothing
    assert start(folder, "run.steps=3")[0] == 0


def test_links_at_temporary_names_are_replaced(tmp_path: Path) -> None:
    folder, precious = copy_fixture(tmp_path / "run"), tmp_path / "precious"
    precious.write_text("keep")
    names = (".config.yaml.partial", ".environment.json.partial", "config.yaml", "environment.json", ".rank-0.probe")
    for name in names:
        (folder / "run" / name).unlink(missing_ok=True)
        (folder / "run" / name).symlink_to(precious)
    assert start(folder, "run.steps=6")[0] == TRAINS
    assert precious.read_text() == "keep" and not any((folder / "run" / name).is_symlink() for name in names)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_fixture(tmp_path_factory.mktemp("damaged") / "run")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(NAMES),
    content=st.binary(max_size=300) | st.sampled_from(HOSTILE),
    place=st.none() | st.integers(0, 5000),
    steps=st.sampled_from([3, 6]),
)
def test_any_bytes_in_a_small_file(name: str, content: bytes, place: int | None, steps: int, damaged: Path) -> None:
    """Replace a file by any bytes, or overwrite a part of it: one line, and no exception."""
    path = damaged / "run" / name
    before = path.read_bytes() if path.exists() else None
    config = (damaged / "run" / "config.yaml").read_bytes()
    start_of_change = min(place or 0, len(before or b""))
    kept = (before or b"") if place is not None else b""
    path.write_bytes(kept[:start_of_change] + content + kept[start_of_change + len(content) :])
    try:
        code, lines = start(damaged, f"run.steps={steps}")
    finally:
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_bytes(before)
        (damaged / "run" / "config.yaml").write_bytes(config)
    assert code in (0, 2, TRAINS)
    assert code != 2 or "\n" not in lines[-1]


def test_a_run_whose_directory_is_replaced_stops_without_writing_there(tmp_path: Path) -> None:
    shards, run = packed_set(tmp_path, 24).path, tmp_path / "run"
    words = command(shards, run, "run.steps=1000000", "run.checkpoint_every=2", "run.keep_last=1")
    processes = start_ranks(words, 1)
    try:
        deadline = time.monotonic() + 200
        while not (run / "checkpoints" / "latest").exists():
            assert time.monotonic() < deadline and processes[0].poll() is None
            time.sleep(0.02)
        # a cleaner of hidden files does not let a second start in
        (run / LOCK_NAME).unlink()
        (code, _, errors), *_ = run_ranks(words, 1, 100)
        assert code == 2 and "another run is writing" in errors
        run.rename(tmp_path / "moved")
        run.mkdir()
        ended = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode == 2, ended
    assert "was moved, replaced or deleted" in ended[0][1] and "Traceback" not in ended[0][1]
    assert not list(run.iterdir())


def test_an_unforeseen_error_of_a_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> Path:
        raise OSError(errno.EIO, "Input/output error", "/some/file")

    monkeypatch.setattr(main, "starting_checkpoint", fail)
    monkeypatch.setattr(sys, "argv", command(tmp_path / "set", tmp_path / "run"))
    assert main.train_rank(main.parse_arguments()) == 2
    output = capsys.readouterr()
    lines = (output.out + output.err).splitlines()
    assert lines == ["error: /some/file: Input/output error; correct that and run the same command again"]


def test_leftovers_that_cannot_be_listed_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints" / ".step-1.partial").mkdir(parents=True)

    def fail(*_: object, **__: object) -> os.stat_result:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", fail)
        remove_leftovers(tmp_path)
    assert (tmp_path / "checkpoints" / ".step-1.partial").is_dir()
