"""A checkpoint that was damaged where it lies: the newest whole one before it is gone on from, and that is said."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from faults.test_writer import SHAPES, saved
from joined_processes import run_on_ranks

from streamtrain.checkpoint.reader import find_newest_intact, read_weights
from streamtrain.errors import CheckpointError
from streamtrain.run.directory import saved_steps, starting_checkpoint, step_folder

RANK_1 = "rank-00001-of-00002.safetensors"


def flip_a_bit(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


def damage(folder: Path, kind: str) -> str:
    """What is then said of it."""
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
        # a valid document, but of another slot
        text = (folder / "state.json").read_text()
        (folder / "state.json").write_text(text.replace('"slot": 3', '"slot": 9'))
        return "state.json has a wrong checksum"
    flip_a_bit(folder / "manifest.json", 0.4)
    return "manifest.json is damaged"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 2 ranks with whole checkpoints of steps 2 and 3."""
    folder = tmp_path_factory.mktemp("whole")
    for step in (2, 3):
        (folder / str(step) / "run").mkdir(parents=True)
        saved(folder / str(step), (step,), 2)
    shutil.move(step_folder(folder / "2" / "run", 2), step_folder(folder / "3" / "run", 2))
    return folder / "3" / "run"


def agree(rank: int, run: Path, resume_from: Path | None, out: Path) -> None:
    try:
        found = str(find_newest_intact(run, resume_from))
    except CheckpointError as error:
        found = f"error: {error}"
    (out / f"rank-{rank}").write_text(found)


def agreed(run: Path, resume_from: Path | None = None) -> str:
    """What both ranks find."""
    out = Path(tempfile.mkdtemp(dir=run.parent))
    run_on_ranks(agree, out, run, resume_from, out)
    first, second = (path.read_text() for path in sorted(out.glob("rank-*")))
    assert first == second
    return first


@pytest.mark.parametrize("kind", ["truncated", "flipped", "missing", "position", "manifest"])
def test_the_newest_whole_one_is_found(kind: str, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ours = tmp_path / "ours"
    shutil.copytree(run, ours)
    told = damage(step_folder(ours, 3), kind)
    # what can be told from sizes and the small files is told before torch is loaded
    assert starting_checkpoint(ours, None) == step_folder(ours, 3 if kind == "flipped" else 2)
    with pytest.raises(CheckpointError, match=r"step-000000003 cannot be read: "):
        read_weights(ours, 3)
    # another run's folder stays as it is
    assert agreed(tmp_path / "new", ours) == str(step_folder(ours, 2)) and saved_steps(ours) == [2, 3]
    capfd.readouterr()
    assert agreed(ours) == str(step_folder(ours, 2))
    said = capfd.readouterr().out
    aside = ours / "checkpoints" / "damaged-step-000000003"
    assert f"warning: checkpoint step-000000003 is damaged: {told}" in said and f"it is kept as {aside}\n" in said
    assert said.endswith("going on from step-000000002, the newest whole one\n") and said.count("\n") == 2
    assert saved_steps(ours) == [2] and aside.is_dir()
    # nothing whole is left: that is no fresh start
    damage(step_folder(ours, 2), "truncated")
    assert agreed(ours).startswith(f"error: checkpoint {step_folder(ours, 2)} cannot be read: ") and aside.is_dir()


def test_latest_is_for_people(run: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    shutil.copytree(run, ours)
    (ours / "checkpoints" / "latest").unlink()
    assert agreed(ours) == str(step_folder(ours, 3))
    assert set(read_weights(ours)) == set(SHAPES)
