"""What a start compares itself with, and says of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ranks import ROOT
from test_nothing_silent import leaves

from streamtrain.config.load import build, merge
from streamtrain.config.tree import Config
from streamtrain.errors import CheckpointError
from streamtrain.run.atomic_io import sum_of
from streamtrain.run.directory import STATE_NAME, folder_of, saved_state, starting_checkpoint
from streamtrain.run.provenance import program
from streamtrain.run.resume_policy import FIXED, FLAG, FREE, check_resume, made_by
from streamtrain.run.step_manifest import write_manifest


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run on two ranks."""
    checkpoint(tmp_path, 3, **made_by(build(settings(tmp_path)), "fp32"))
    return tmp_path


def checkpoint(run_dir: Path, step: int, **state: Any) -> Path:
    """What tells a start of one."""
    folder = folder_of(run_dir, step)
    folder.mkdir(parents=True, exist_ok=True)
    document = {"world_size": 2, "data": {"digest": "x", "lane_block": 1}, **state}
    (folder / STATE_NAME).write_text(json.dumps(document))
    write_manifest(folder, {STATE_NAME: sum_of(folder / STATE_NAME)})
    return folder


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return merge({"run": {"dir": str(folder)}, "data": {"micro_batch": 4}}, changes)


def told(run: Path, changes: dict[str, Any], *, ranks: int = 2, accept: bool = False) -> list[str]:
    return resumed(build(settings(run, **changes)), run, ranks, accept)


def resumed(
    config: Config, run: Path, ranks: int = 2, accept: bool = False, dtype: str | None = None
) -> list[str]:
    source = starting_checkpoint(run, None)
    assert source is not None
    saved = saved_state(source)
    assert saved is not None
    return check_resume(config, source, saved, ranks, accept, dtype)


def test_every_key_is_of_one_kind_and_the_guide_lists_them() -> None:
    keys = set(leaves())
    for pattern in (*FREE, *FIXED):
        assert any(key == pattern or key.startswith(f"{pattern}.") for key in keys), pattern
    assert not set(FREE) & set(FIXED)
    guide = (ROOT / "docs" / "reliability.md").read_text().partition("## What may change")[2].partition("\n## ")[0]
    free, fixed = guide.partition("**May not change**")[::2]
    for text, wanted in ((free, FREE), (fixed.partition("**Only with")[0], FIXED)):
        paragraph = max(text.split("\n\n"), key=len)
        assert tuple(re.findall(r"`([^`]+)`", paragraph)) == wanted


def test_what_may_change_is_not_told(run: Path) -> None:
    assert told(run, {}) == []
    free = {
        "run": {"steps": 7, "checkpoint_every": 3}, "engine": {"moments": "host"},
        "monitor": {"collapse": {"every": 1}},
        "data": {"micro_batch": 2, "global_batch": 8, "prefetch": 5, "shards": "elsewhere"},
    }  # fmt: skip
    assert told(run, free, ranks=4) == []


def test_what_may_not_change_is_refused_whatever_is_accepted(run: Path, tmp_path: Path) -> None:
    head = {"global_loss": {"head": {"prototypes": 7}}}
    for accept in (False, True):
        with pytest.raises(CheckpointError) as error:
            told(run, {"model": {"dim": 96, "depth": 3}, "run": {"seed": 4}, "objective": head}, accept=accept)
        for change in ("model.depth was 12 and is now 3", "model.dim was 384 and is now 96", "run.seed was 0 and is n"):
            assert change in str(error.value)
        assert "objective.global_loss.head.prototypes was 65536 and is now 7" in str(error.value)
    # of another run's, these alone are looked at
    ours = build(settings(tmp_path / "next", optim={"clip": 1.0}))
    assert resumed(ours, run, 1) == []
    with pytest.raises(CheckpointError, match=r"model\.dim was 384"):
        resumed(build(settings(tmp_path / "next", model={"dim": 96})), run, accept=True)


def test_what_changes_results_is_refused_or_accepted(run: Path) -> None:
    changes = {"optim": {"clip": 1.0}, "schedules": {"weight_decay": 0.5}}
    with pytest.raises(CheckpointError) as error:
        told(run, changes)
    assert "optim.clip was 3.0 and is now 1.0; schedules.weight_decay." in str(error.value)
    assert str(error.value).endswith("start it as it was, or add --accept-changes to go on all the same")
    accepted = told(run, changes, accept=True)
    assert accepted[0] == "optim.clip was 3.0 and is now 1.0" and "schedules.weight_decay.peak" in accepted[-1]
    with pytest.raises(CheckpointError, match=r"the batch was 8 images and is now 12 \(data.global_batch=8 keeps it\)"):
        told(run, {}, ranks=3)
    assert told(run, {"data": {"global_batch": 8}}) == []


def test_another_program_is_told(run: Path) -> None:
    was = made_by(build(settings(run)), "fp32")
    assert was["program"] == program() and {"torch", "deepspeed", "numpy", "code"} <= set(program())
    was["program"] |= {"torch": "1.0", "code": "0123456789ab", "cupy": "3"}
    checkpoint(run, 3, **was)
    with pytest.raises(CheckpointError) as error:
        told(run, {})
    assert f"code was 0123456789ab and is now {program()['code']}; cupy was 3 and is now not there" in str(error.value)
    assert f"torch was 1.0 and is now {program()['torch']}" in str(error.value)
    assert len(told(run, {}, accept=True)) == 3


def test_a_machine_that_computes_in_other_numbers_is_told(run: Path) -> None:
    """``engine.dtype=auto`` leaves that to the machine."""
    config = build(settings(run))
    assert resumed(config, run, dtype="fp32") == []
    told = r"it computed in fp32, and this machine would in bf16 \(engine.dtype=fp32 keeps it\)"
    with pytest.raises(CheckpointError, match=f"{told}; .*{FLAG}"):
        resumed(config, run, dtype="bf16")
    assert len(resumed(config, run, dtype="bf16", accept=True)) == 1
    # what an earlier version saved does not say
    checkpoint(run, 3, **{key: value for key, value in made_by(config, "fp32").items() if key != "dtype"})
    assert resumed(config, run, dtype="bf16") == []


@pytest.mark.parametrize("content", [None, 3, [], "text"])
@pytest.mark.parametrize("name", ["config", "program"])
def test_what_a_checkpoint_does_not_say_is_no_agreement(run: Path, name: str, content: Any) -> None:
    checkpoint(run, 3, **made_by(build(settings(run)), "fp32") | {name: content})
    with pytest.raises(CheckpointError, match=f"step-000000003 does not say .*add {FLAG}"):
        told(run, {})
    assert len(told(run, {}, accept=True)) == 1


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"[" * 10_000, b"[]", b'{"data": {"lane_block": 1}}'])
def test_what_a_damaged_checkpoint_says_is_not_believed(run: Path, content: bytes | None) -> None:
    newer = checkpoint(run, 7, **made_by(build(settings(run)), "fp32"))
    assert starting_checkpoint(run, None) == newer
    (newer / STATE_NAME).unlink()
    if content is not None:
        # with the size that it had
        size = folder_of(run, 3).joinpath(STATE_NAME).stat().st_size
        (newer / STATE_NAME).write_bytes(content.ljust(size, b" ")[:size])
    assert saved_state(newer) is None and starting_checkpoint(run, None) == folder_of(run, 3)
