"""Comparison of the current settings with the checkpoint to resume."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from streamtrain.config.load import build, merge
from streamtrain.config.model import ModelConfig
from streamtrain.config.tree import Config
from streamtrain.errors import CheckpointError, ConfigError
from streamtrain.run.atomic_io import compute_checksum
from streamtrain.run.directory import STATE_NAME, saved_state, starting_checkpoint, step_folder
from streamtrain.run.provenance import program_versions
from streamtrain.run.resume_policy import (
    accepted_keys,
    add_accept_options,
    build_provenance,
    check_resume,
    parse_accepted,
    separate_overrides,
    version_changes,
)
from streamtrain.run.step_manifest import CheckpointManifest


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Directory of a run on two ranks with a checkpoint of step 3."""
    write_checkpoint(tmp_path, 3, **build_provenance(build(settings(tmp_path)), "fp32"))
    return tmp_path


def write_checkpoint(run_dir: Path, step: int, **state: Any) -> Path:
    """Write a checkpoint that has only its ``state.json``."""
    folder = step_folder(run_dir, step)
    folder.mkdir(parents=True, exist_ok=True)
    document = {"world_size": 2, "data": {"digest": "x", "lane_block": 1}, **state}
    (folder / STATE_NAME).write_text(json.dumps(document))
    CheckpointManifest({STATE_NAME: compute_checksum(folder / STATE_NAME)}).write(folder)
    return folder


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return merge({"run": {"dir": str(folder)}, "data": {"micro_batch": 4}}, changes)


def resume(run: Path, changes: dict[str, Any], *, ranks: int = 2, accepted: Collection[str] = ()) -> list[str]:
    return check(build(settings(run, **changes)), run, ranks, accepted)


def check(
    config: Config, run: Path, ranks: int = 2, accepted: Collection[str] = (), dtype: str | None = None
) -> list[str]:
    source = starting_checkpoint(run, None)
    assert source is not None
    saved = saved_state(source)
    assert saved is not None
    return check_resume(config, source, saved, ranks, accepted, dtype)


def test_free_settings_may_change(run: Path) -> None:
    assert resume(run, {}) == []
    free = {
        "run": {"steps": 7, "checkpoint_every": 3}, "engine": {"moments": "host"},
        "monitor": {"collapse": {"every": 1}},
        "data": {"micro_batch": 2, "global_batch": 8, "prefetch": 5, "shards": "elsewhere"},
    }  # fmt: skip
    assert resume(run, free, ranks=4) == []


def test_fixed_settings_are_refused_even_if_accepted(run: Path, tmp_path: Path) -> None:
    head = {"global_loss": {"head": {"prototypes": 7}}}
    for accepted in ((), ("*",), ("model.dim", "model.depth", "run.seed")):
        with pytest.raises(CheckpointError, match=r"^fixed settings differ .*; restore them, or set run.dir") as error:
            resume(run, {"model": {"dim": 96, "depth": 3}, "run": {"seed": 4}, "objective": head}, accepted=accepted)
        for change in (
            "model.depth is 3, the checkpoint has 12",
            "model.dim is 96, the checkpoint has 384",
            "objective.global_loss.head.prototypes is 7, the checkpoint has 65536",
            "run.seed is 4",
        ):
            assert change in str(error.value)
    # with another run's checkpoint, only fixed settings are compared
    other = build(settings(tmp_path / "next", optim={"clip": 1.0}))
    assert check(other, run, 1) == []
    with pytest.raises(CheckpointError, match=r"model\.dim is 96, the checkpoint has 384; .* start without --resume"):
        check(build(settings(tmp_path / "next", model={"dim": 96})), run, accepted=("*",))


def test_other_settings_are_accepted_one_by_one(run: Path) -> None:
    changes = {"optim": {"clip": 1.0, "eps": 1e-7}, "schedules": {"weight_decay": 0.5}}
    keys = {"optim.clip", "optim.eps", "schedules.weight_decay"}
    with pytest.raises(CheckpointError) as error:
        resume(run, changes)
    assert "optim.clip is 1.0, the checkpoint has 3.0; optim.eps is" in str(error.value)
    assert str(error.value).endswith("restore them, or add --accept optim.clip optim.eps schedules.weight_decay")
    for missing in keys:
        with pytest.raises(CheckpointError) as error:
            resume(run, changes, accepted=keys - {missing})
        assert str(error.value).endswith(f"or add --accept {missing}") and str(error.value).count(" is ") <= 3
        assert not any(other in str(error.value) for other in keys - {missing})
    for accepted in (keys, {"*"}):
        texts = resume(run, changes, accepted=accepted)
        assert texts[0] == "optim.clip is 1.0, the checkpoint has 3.0" and "schedules.weight_decay.peak" in texts[-1]


def test_part_of_a_schedule_can_be_accepted(run: Path) -> None:
    changes = {"schedules": {"momentum": {"kind": "cosine", "peak": 0.9, "end": 1.0, "warmup": 5}}}
    with pytest.raises(CheckpointError, match=r"schedules.momentum.warmup is 5.*add --accept schedules.momentum$"):
        resume(run, changes, accepted=("schedules.momentum.peak",))
    assert len(resume(run, changes, accepted=("schedules.momentum.peak", "schedules.momentum.warmup"))) == 2


def test_the_batch_is_compared_as_a_number_of_images(run: Path) -> None:
    message = r"the batch is 12, the checkpoint has 8 images \(data.global_batch=8 keeps it\).* data.global_batch$"
    with pytest.raises(CheckpointError, match=message):
        resume(run, {}, ranks=3)
    assert len(resume(run, {}, ranks=3, accepted=("data.global_batch",))) == 1
    assert resume(run, {"data": {"global_batch": 8}}) == []


def test_the_data_type_is_compared_as_the_one_in_use(run: Path) -> None:
    """``engine.dtype=auto`` stands for fp32 or bf16, depending on the machine."""
    config = build(settings(run))
    assert check(config, run) == check(config, run, dtype="fp32") == []
    message = r"the data type is bf16, the checkpoint has fp32 \(engine.dtype=fp32 keeps it\).*--accept engine.dtype$"
    with pytest.raises(CheckpointError, match=message):
        check(config, run, dtype="bf16")
    assert len(check(config, run, dtype="bf16", accepted=("engine.dtype",))) == 1
    # the suggested setting counts as unchanged; another explicit one is a change without knowing the current dtype
    assert resume(run, {"engine": {"dtype": "fp32"}}) == []
    with pytest.raises(CheckpointError, match=message):
        resume(run, {"engine": {"dtype": "bf16"}})
    # older checkpoints do not record the data type
    state = {key: value for key, value in build_provenance(config, "fp32").items() if key != "dtype"}
    write_checkpoint(run, 3, **state)
    assert check(config, run, dtype="bf16") == []


def test_other_versions_are_reported_and_not_refused(run: Path) -> None:
    config, provenance = build(settings(run)), build_provenance(build(settings(run)), "fp32")
    current = program_versions()
    assert provenance["program"] == current and {"torch", "deepspeed", "numpy", "code"} <= set(current)

    def changes() -> list[str]:
        saved = saved_state(step_folder(run, 3))
        assert saved is not None and resume(run, {}) == []
        assert version_changes(build(settings(run / "next")), step_folder(run, 3), saved) == []
        return version_changes(config, step_folder(run, 3), saved)

    assert changes() == []
    provenance["program"] |= {"torch": "1.0", "code": "0123456789ab", "cupy": "3"}
    provenance["config"]["optim"]["nu"] = 3
    write_checkpoint(run, 3, **provenance)
    assert changes() == [
        f"code is {current['code']}, the checkpoint has 0123456789ab",
        "cupy is missing, the checkpoint has 3",
        f"torch is {current['torch']}, the checkpoint has 1.0",
        "the checkpoint has a setting 'optim.nu' that no longer exists",
    ]
    for program in (None, 3, [], "text"):
        write_checkpoint(run, 3, **provenance | {"program": program})
        assert changes()[0] == "step-000000003 does not record its versions"


def test_a_setting_that_the_checkpoint_lacks_had_its_default(run: Path) -> None:
    provenance = build_provenance(build(settings(run)), "fp32")
    del provenance["config"]["optim"]["clip"], provenance["config"]["crops"]
    write_checkpoint(run, 3, **provenance)
    assert resume(run, {}) == []
    with pytest.raises(CheckpointError, match=r"optim.clip is 1.0, the checkpoint has 3.0; .*--accept optim.clip$"):
        resume(run, {"optim": {"clip": 1.0}})


@pytest.mark.parametrize("content", [None, 3, [], "text"])
def test_a_checkpoint_without_settings_must_be_accepted(run: Path, content: Any) -> None:
    write_checkpoint(run, 3, **build_provenance(build(settings(run)), "fp32") | {"config": content})
    with pytest.raises(CheckpointError, match=r"step-000000003 does not record its settings; .*add --accept config$"):
        resume(run, {})
    assert len(resume(run, {}, accepted=("config",))) == 1


def parse_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setattr("sys.argv", ["main.py", *words])
    parser = argparse.ArgumentParser()
    add_accept_options(parser)
    parser.add_argument("overrides", nargs="*")
    assert "--accept KEY" in parser.format_help() and "accept-changes" not in parser.format_help()
    arguments = parser.parse_intermixed_args()
    separate_overrides(arguments)
    return arguments


def test_accept_takes_keys_and_leaves_overrides(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["run.steps=1", "--accept", "optim.clip", "optim.eps", "run.steps=2", "--accept=schedules.lr,crops.flip",
             "run.steps=3"]  # fmt: skip
    arguments = parse_command(words, monkeypatch)
    assert arguments.overrides == ["run.steps=1", "run.steps=2", "run.steps=3"]
    assert accepted_keys(arguments, 0) == {"optim.clip", "optim.eps", "schedules.lr", "crops.flip"}
    assert accepted_keys(parse_command([], monkeypatch), 0) == frozenset() and not caplog.records
    arguments = parse_command(["--accept-changes", "run.steps=3"], monkeypatch)
    assert "*" in accepted_keys(arguments, 1) and not caplog.records
    assert "*" in accepted_keys(arguments, 0) and "--accept-changes is deprecated" in caplog.text


def test_accepted_keys_are_checked() -> None:
    assert parse_accepted(["optim.clip,schedules.lr", "schedules.momentum.peak"]) == {
        "optim.clip", "schedules.lr", "schedules.momentum.peak",
    }  # fmt: skip
    assert parse_accepted(["data.shards", "config"]) == {"data.shards", "config"} and parse_accepted([]) == frozenset()
    for value, message in (
        ("run.seed", "--accept run.seed: this setting is fixed for a run; set run.dir to a new directory"),
        ("optim.clip,model.dim", "--accept model.dim: this setting is fixed"),
        ("optim.clib", "--accept: unknown key optim.clib; did you mean optim.clip?"),
        ("schedules.lr.peek", "--accept: unknown key schedules.lr.peek; did you mean schedules.lr.peak?"),
        ("optim", "--accept optim: this is a section; give the keys"),
        ("*", "--accept: unknown key *"),
    ):
        with pytest.raises(ConfigError) as error:
            parse_accepted([value])
        assert message in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"[" * 10_000, b"[]", b'{"data": {"lane_block": 1}}'])
def test_a_damaged_checkpoint_state_is_ignored(run: Path, content: bytes | None) -> None:
    newer = write_checkpoint(run, 7, **build_provenance(build(settings(run)), "fp32"))
    assert starting_checkpoint(run, None) == newer
    (newer / STATE_NAME).unlink()
    if content is not None:
        # same size as before, so that only the checksum differs
        size = step_folder(run, 3).joinpath(STATE_NAME).stat().st_size
        (newer / STATE_NAME).write_bytes(content.ljust(size, b" ")[:size])
    assert saved_state(newer) is None and starting_checkpoint(run, None) == step_folder(run, 3)


def test_a_feature_teacher_is_compared_with_its_defaults(tmp_path: Path) -> None:
    def teacher(**model: Any) -> Config:
        section = {"kind": "frozen", "weights": "w", "model": {"dim": 48, "num_heads": 3, **model}}
        return build(settings(tmp_path, teacher=section))

    default = ModelConfig().model_dump(mode="json")
    # a version that records every key and one that knows fewer; whichever wrote the checkpoint
    full = {key: default[key] for key in ("lora", "layerscale", "num_registers", "factory")}
    for recorded, current in ((teacher(), teacher(**full)), (teacher(**full), teacher())):
        write_checkpoint(tmp_path, 3, **build_provenance(recorded, "fp32"))
        assert check(current, tmp_path) == []
        with pytest.raises(CheckpointError, match=r"teacher\.model\.num_registers is 2, the checkpoint has 4"):
            check(teacher(num_registers=2), tmp_path)
