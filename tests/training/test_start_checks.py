"""Refusals and warnings of a start that this machine has too little memory or disk space for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from drawn_images import packed_set

from streamtrain.config.load import load_config
from streamtrain.config.tree import Config
from streamtrain.engine.rendezvous import Launch
from streamtrain.errors import ConfigError, StreamtrainError
from streamtrain.planning.units import size
from streamtrain.run.directory import step_folder
from streamtrain.run.machine import Space
from streamtrain.training import start_checks
from streamtrain.training.start_checks import check_folders, check_resources, plan_of_start, start_facts

AMPLE = Space(10**15, 10**15)


@pytest.fixture(autouse=True)
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plans, which count threads, be the same on each machine."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(64)))


def config_of(run_dir: Path, *overrides: str) -> Config:
    return load_config("vits16", ["engine.device=cpu", f"run.dir={run_dir}", *overrides])


def check(
    config: Config, monkeypatch: pytest.MonkeyPatch, memory: Space | None = AMPLE, disk: Space | None = AMPLE,
    accepted: tuple[str, ...] = (), ranks: int = 1,
) -> list[str]:  # fmt: skip
    monkeypatch.setattr(start_checks, "host_memory", lambda: memory)
    monkeypatch.setattr(start_checks, "disk_space", lambda folder: disk)
    return check_resources(config, Launch(0, ranks, 0, ranks), accepted, on_gpu=False)


@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_above_the_total_is_refused_and_above_the_free_part_a_warning(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # whether there is room for the copy of a checkpoint depends on the memory of this machine
    config = config_of(tmp_path / "run", "run.save_in_background=false")
    needed = ranks * plan_of_start(config, Launch(0, ranks, 0, ranks), on_gpu=False).rank_bytes
    assert check(config, monkeypatch, Space(needed, needed), ranks=ranks) == []
    assert check(config, monkeypatch, None, ranks=ranks) == []
    (line,) = check(config, monkeypatch, Space(needed, needed // 2), ranks=ranks)
    assert f"needs about {size(needed)}" in line and f"{size(needed // 2)} free of" in line
    # within the accuracy of the plan
    assert len(check(config, monkeypatch, Space(int(needed / 1.09), 0), ranks=ranks)) == 1
    with pytest.raises(StreamtrainError) as caught:
        check(config, monkeypatch, Space(int(needed / 1.2), 0), ranks=ranks)
    for word in (size(needed), size(needed / 1.2), "data.micro_batch (now 16)", "plan --fit"):
        assert word in str(caught.value)
    assert ("fewer ranks" in str(caught.value)) == (ranks > 1)
    assert str(caught.value).endswith("to start anyway, add --accept memory")
    assert len(check(config, monkeypatch, Space(int(needed / 1.2), 0), accepted=("memory",), ranks=ranks)) == 1


def test_too_little_disk_for_the_planned_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "run"
    config = config_of(run_dir, "run.keep_last=4", "run.keep_every=2000")
    parts = plan_of_start(config, Launch(0, 1, 0, 1), on_gpu=False).parts
    planned = sum(part.num_bytes for part in parts if part.location == "disk")
    assert check(config, monkeypatch, disk=Space(planned, planned)) == []
    (line,) = check(config, monkeypatch, disk=Space(planned, planned - 1))
    assert "run.keep_last (now 4), run.keep_every (now 2000) or run.checkpoint_every (now 1000)" in line
    # the present checkpoints of a resumed run count
    folder = step_folder(run_dir, 1000)
    folder.mkdir(parents=True)
    (folder / "values").write_bytes(b"1")
    assert check(config, monkeypatch, disk=Space(planned, planned - 1)) == []
    # a run with a checkpoint starts even on a full disk
    assert len(check(config, monkeypatch, disk=Space(planned, 0))) == 1
    with pytest.raises(StreamtrainError, match=r"a checkpoint takes 1\.\d\d GB, .* 500 MB free; .* --accept disk"):
        check(config_of(tmp_path / "new"), monkeypatch, disk=Space(planned, 5 * 10**8))
    assert check(config_of(tmp_path / "new"), monkeypatch, disk=Space(planned, 0), accepted=("disk",)) != []


def test_a_gpu_is_compared_with_its_own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, launch = config_of(tmp_path / "run"), Launch(0, 2, 0, 2)
    needed = plan_of_start(config, Launch(0, 2, 0, 2), on_gpu=True).gpu_bytes
    monkeypatch.setattr(start_checks, "host_memory", lambda: AMPLE)
    monkeypatch.setattr(start_checks, "_gpu_memory", lambda index: Space(needed, needed))
    assert check_resources(config, launch, (), on_gpu=True) == []
    monkeypatch.setattr(start_checks, "_gpu_memory", lambda index: Space(needed // 2, needed // 2))
    with pytest.raises(StreamtrainError, match=f"needs about {size(needed)} of GPU memory, but"):
        check_resources(config, launch, (), on_gpu=True)


@pytest.mark.parametrize(
    ("settings", "memory", "expected"),
    [
        ((), 80, r"data.micro_batch is 16, so the host may limit the speed of this small network; data.micro_batch=128 "
                 r"needs [\d.]+ GB of 80.0 GB, with 128 images per step"),
        ((), 8, r".* data.micro_batch=64 needs [\d.]+ GB of 8.00 GB, with 64 images per step"),
        (("data.global_batch=64",), 80, r".* data.micro_batch=64 needs [\d.]+ GB of 80.0 GB"),
        (("data.global_batch=48",), 80, None),
        (("data.micro_batch=64",), 80, None),
        (("model.preset=vitl16",), 80, None),
        ((), 6, None),
    ],
)  # fmt: skip
def test_a_small_network_on_a_gpu_gets_a_larger_micro_batch_if_it_fits(
    settings: tuple[str, ...], memory: int, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("vits16", [f"run.dir={tmp_path / 'run'}", *settings])
    monkeypatch.setattr(start_checks, "host_memory", lambda: AMPLE)
    space = Space(memory * 10**9, memory * 10**9)
    monkeypatch.setattr(start_checks, "_gpu_memory", lambda index: space)
    lines = check_resources(config, Launch(0, 1, 0, 1), ("memory",), on_gpu=True)
    assert len(lines) == (expected is not None) and all(re.fullmatch(str(expected), line) for line in lines)
    # a run that is resumed keeps its batch
    step_folder(tmp_path / "run", 3).mkdir(parents=True)
    (step_folder(tmp_path / "run", 3) / "manifest.json").write_text("{}")
    assert check_resources(config, Launch(0, 1, 0, 1), ("memory",), on_gpu=True) == []


def test_more_ranks_than_cores_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = check(config_of(tmp_path / "run", "data.micro_batch=1"), monkeypatch, ranks=65)
    assert line.startswith("65 ranks share 64 core(s)")


def test_a_run_directory_inside_a_set_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path / "set" / "run", f"data.shards={tmp_path / 'set'}")
    with pytest.raises(ConfigError, match="is inside the shard set"):
        check_folders(config)
    step_folder(tmp_path / "set" / "run", 1).mkdir(parents=True)
    check_folders(config)  # an earlier run may resume


def test_an_evaluation_does_not_test_on_its_training_images(tmp_path: Path) -> None:
    same = [f"evaluation.train={tmp_path / 'a'}", f"evaluation.test={tmp_path / 'b' / '..' / 'a'}"]
    with pytest.raises(ConfigError, match="its own nearest neighbour"):
        check_folders(config_of(tmp_path / "run", *same))
    check_folders(config_of(tmp_path / "run", same[0], f"evaluation.test={tmp_path / 'b'}"))


def test_ranks_compare_settings_and_images_but_not_paths(tmp_path: Path) -> None:
    one_set, launch = packed_set(tmp_path, 8), Launch(0, 2, 0, 1)
    paths = ("engine.cpu_threads=3", f"data.shards={tmp_path}")
    first, same, other = (
        start_facts(config_of(tmp_path / name, *overrides), one_set, launch)
        for name, overrides in (("a", ()), ("b", paths), ("a", ("run.seed=1", "engine.dtype=fp32")))
    )
    assert first.values == same.values and first.folder == tmp_path / "a"
    differing = {key for key in first.values if first.values[key] != other.values[key]}
    assert {"run.seed", "engine.dtype"} <= differing <= {"run.seed", "engine.dtype", "the precision of engine.dtype"}
    assert first.values["the digest of the images"] == one_set.digest and "the version of torch" in first.values
