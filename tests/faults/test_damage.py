"""Damaged checkpoints: resume from the newest intact one before, with a warning."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from faults.test_writer import SHAPES, save_on_ranks
from joined_processes import run_on_ranks

from streamtrain.checkpoint.reader import find_newest_intact, read_weights
from streamtrain.errors import CheckpointError
from streamtrain.run.directory import saved_steps, starting_checkpoint, step_folder
from streamtrain.run.logs import configure_logging

RANK_1 = "rank-00001-of-00002.safetensors"


def flip_a_bit(path: Path, where: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 4
    path.write_bytes(content)


def damage(folder: Path, kind: str) -> str:
    """Damage a checkpoint in one way; return the expected description."""
    if kind == "truncated":
        content = (folder / RANK_1).read_bytes()
        (folder / RANK_1).write_bytes(content[:-9])
        return f"{RANK_1} has {len(content) - 9} bytes, not {len(content)}"
    if kind == "flipped":
        flip_a_bit(folder / RANK_1, 0.9)
        return f"{RANK_1} has a wrong checksum"
    if kind == "missing":
        (folder / "shared.safetensors").unlink()
        return "shared.safetensors: No such file"
    if kind == "position":
        # a valid document with a different slot
        text = (folder / "state.json").read_text()
        (folder / "state.json").write_text(text.replace('"slot": 3', '"slot": 9'))
        return "state.json has a wrong checksum"
    flip_a_bit(folder / "manifest.json", 0.4)
    return "manifest.json is damaged"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run of 2 ranks with intact checkpoints of steps 2 and 3."""
    folder = tmp_path_factory.mktemp("whole")
    for step in (2, 3):
        (folder / str(step) / "run").mkdir(parents=True)
        save_on_ranks(folder / str(step), (step,), 2)
    shutil.move(step_folder(folder / "2" / "run", 2), step_folder(folder / "3" / "run", 2))
    return folder / "3" / "run"


def write_found(rank: int, run: Path, resume_from: Path | None, out: Path) -> None:
    configure_logging(rank, 2)
    try:
        result = str(find_newest_intact(run, resume_from))
    except CheckpointError as error:
        result = f"error: {error}"
    (out / f"rank-{rank}").write_text(result)


def find_newest(run: Path, resume_from: Path | None = None) -> str:
    """Return the checkpoint that both ranks find."""
    out = Path(tempfile.mkdtemp(dir=run.parent))
    run_on_ranks(write_found, out, run, resume_from, out)
    first, second = (path.read_text() for path in sorted(out.glob("rank-*")))
    assert first == second
    return first


@pytest.mark.parametrize("kind", ["truncated", "flipped", "missing", "position", "manifest"])
def test_the_newest_intact_one_is_used(kind: str, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    message = damage(step_folder(copy, 3), kind)
    # sizes and small files are checked before torch is imported
    assert starting_checkpoint(copy, None) == step_folder(copy, 3 if kind == "flipped" else 2)
    with pytest.raises(CheckpointError, match=r"step-000000003 cannot be read: "):
        read_weights(copy, 3)
    # another run's directory is not modified
    assert find_newest(tmp_path / "new", copy) == str(step_folder(copy, 2)) and saved_steps(copy) == [2, 3]
    capfd.readouterr()
    assert find_newest(copy) == str(step_folder(copy, 2))
    output = capfd.readouterr()
    moved = copy / "checkpoints" / "damaged-step-000000003"
    warning = f"warning: checkpoint step-000000003 is damaged: {message}"
    assert output.err.startswith(warning) and output.err.endswith(f"it is kept as {moved}\n")
    assert "from step-000000002, the newest" in output.out and (output.err + output.out).count("\n") == 2
    assert saved_steps(copy) == [2] and moved.is_dir()
    # without an intact checkpoint the run fails instead of starting fresh
    damage(step_folder(copy, 2), "truncated")
    assert find_newest(copy).startswith(f"error: checkpoint {step_folder(copy, 2)} cannot be read: ") and moved.is_dir()


def test_the_latest_file_is_not_needed(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "checkpoints" / "latest").unlink()
    assert find_newest(copy) == str(step_folder(copy, 3))
    assert set(read_weights(copy)) == set(SHAPES)
