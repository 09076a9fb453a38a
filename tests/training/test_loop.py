"""Training in real processes: kill and resume, launchers, stopping, and setup errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from drawn_images import draw_folder
from ranks import ROOT, free_port, run_ranks, start_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shards.packing.pack import PackOptions, pack
from streamtrain.checkpoint import reader as checkpoint
from streamtrain.config.load import read_resolved
from streamtrain.run.directory import saved_state

MAIN = ROOT / "streamtrain" / "main.py"
HEAD = "{prototypes: 64, hidden: 16, bottleneck: 8}"
TINY = (
    "model.patch_size=8", "model.dim=16", "model.depth=2", "model.num_heads=2", "model.drop_path=0.2",
    "crops.global_size=32", "crops.local_size=16", "crops.local_count=2", "data.lanes=4", "data.window=2",
    f"objective.global_loss.head={HEAD}", f"objective.patch_loss.head={HEAD}",
    "engine.cpu_threads=1", "engine.device=cpu", "data.decode_threads=1", "monitor.progress=false",
)  # fmt: skip
LOGGED = (
    "loss/total", "loss/global", "loss/patch", "loss/koleo", "optim/lr", "optim/weight_decay", "optim/gradient_norm",
    "teacher/momentum", "teacher/temperature", "speed/images_per_second", "data/wait_share", "memory/rss_bytes",
)  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    pack(draw_folder(folder / "images", 40), folder / "shards", PackOptions(shard_bytes=8_000))
    return folder / "shards"


@pytest.fixture(scope="module")
def mixture(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The set and another one with a quarter of the images."""
    folder = tmp_path_factory.mktemp("other")
    pack(draw_folder(folder / "images", 13), folder / "shards", PackOptions(shard_bytes=8_000))
    return f"[{{shards: {shards}, weight: 3}}, {{shards: {folder / 'shards'}, weight: 1}}]"


def command(shards: Path | str, run_dir: Path, *overrides: str) -> list[str]:
    given = [f"data.shards={shards}", f"run.dir={run_dir}"]
    return [str(MAIN), "--config", "vits16.yaml", *TINY, *given, *overrides]


def losses(run_dir: Path) -> dict[int, dict[str, Any]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return {r["step"]: {k: v for k, v in r.items() if k.startswith(("loss/", "slot"))} for r in records}


def expect_success(results: Sequence[tuple[int, str, str]]) -> None:
    assert [code for code, _, _ in results] == [0] * len(results), "\n".join(err[-3000:] for _, _, err in results)


def test_a_killed_run_resumes_bit_for_bit(shards: Path, tmp_path: Path) -> None:
    """One rank, softmax centring, no registers; ``faults/test_runs.py`` covers two ranks and Sinkhorn."""
    # 12 steps of 8 samples pass twice over the 40 samples; the kill falls between two checkpoints
    settings = ("run.steps=12", "run.checkpoint_every=2", "data.global_batch=8", "data.micro_batch=2",
                "objective.centering=softmax", "objective.patch_loss.kind=cosine", "model.num_registers=0")  # fmt: skip
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    expect_success(run_ranks(command(shards, straight, *settings), 1))

    processes = start_ranks(command(shards, broken, *settings), 1)
    wait_for_steps(broken, 5, processes)
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()
    # the checkpoint of step 4 was started after that of step 2 was complete
    assert checkpoint.saved_steps(broken)[-1] in range(2, 12, 2)
    # a line torn by a kill
    with open(broken / "metrics.jsonl", "a") as log:
        log.write('{"step": 99, "lo')
    resumed = run_ranks(command(shards, broken, *settings), 1)
    expect_success(resumed)
    assert len(re.findall(r"^resuming at step \d+ from .*/checkpoints/step-", resumed[0][1], re.MULTILINE)) == 1

    assert losses(broken) == losses(straight)
    for which in ("teacher", "student"):
        ours, theirs = (checkpoint.read_weights(run, which=which) for run in (broken, straight))
        assert ours.keys() == theirs.keys() and all(bool((ours[k] == theirs[k]).all()) for k in ours)


def losses_so_far(run_dir: Path) -> list[str]:
    log = run_dir / "metrics.jsonl"
    return log.read_text().splitlines() if log.exists() else []


def wait_for_steps(run_dir: Path, steps: int, processes: list[subprocess.Popen[str]]) -> None:
    """Wait until ``steps`` are logged; fail with the stderr of a rank that ends before."""
    deadline = time.monotonic() + 200
    while len(losses_so_far(run_dir)) < steps:
        ended = [process for process in processes if process.poll() is not None]
        assert not ended, ended[0].communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def launchers(world_size: int) -> dict[str, list[str]]:
    bin_folder = Path(sys.executable).parent
    port = str(free_port())
    return {
        "python": [sys.executable],
        "deepspeed": [str(bin_folder / "deepspeed"), "--num_gpus", str(world_size), "--master_port", port],
        "torchrun": [str(bin_folder / "torchrun"), "--nproc_per_node", str(world_size), "--master_port", port],
    }


@pytest.mark.parametrize(
    ("launcher", "world_size"), [("python", 1), ("deepspeed", 2), pytest.param("torchrun", 2, marks=pytest.mark.slow)]
)
def test_every_launcher_trains_and_everything_is_logged(
    shards: Path, tmp_path: Path, launcher: str, world_size: int
) -> None:
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    clean["PATH"] = f"{Path(sys.executable).parent}:{clean['PATH']}"
    words = command(shards, tmp_path / "run", "run.steps=2", "data.micro_batch=4")
    done = subprocess.run(
        [*launchers(world_size)[launcher], *words], env=clean, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "untested" not in done.stdout + done.stderr
    run = tmp_path / "run"
    assert [record["slot"] for record in losses(run).values()] == [4 * world_size, 8 * world_size]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert set(LOGGED) <= set(tags["scalars"]) and tags["images"]
    assert set(LOGGED) <= set(json.loads(losses_so_far(run)[-1]))
    assert (run / "config.yaml").exists() and json.loads((run / "environment.json").read_text())["program"]
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-000000002"


def test_a_signal_to_one_rank_saves_and_exits_75_on_all(shards: Path, tmp_path: Path) -> None:
    words = command(shards, tmp_path / "run", "run.steps=100000", "data.micro_batch=2", "run.checkpoint_every=0")
    processes = start_ranks(words, 2)
    wait_for_steps(tmp_path / "run", 1, processes)
    # a second run must not write to the run directory; on one rank, because no launcher would end the others
    ((code, _, errors),) = run_ranks(words, 1)
    assert code == 2 and f"another run is writing to {tmp_path / 'run'}" in errors.strip().splitlines()[-1]
    processes[1].send_signal(signal.SIGTERM)
    ended = [(process.communicate(timeout=100), process.returncode) for process in processes]
    assert [code for _, code in ended] == [75, 75], ended[0][0][1][-2000:]
    last = max(losses(tmp_path / "run"))
    assert checkpoint.saved_steps(tmp_path / "run")[-1] == last
    assert f"stopped at step {last}, checkpoint saved; run the same command again to resume" in ended[0][0][0]
    assert "stopped at" not in ended[1][0][0]
    # a complete run prints one line, on rank 0
    results = run_ranks([*words, f"run.steps={last}"], 2)
    assert [(code, out) for code, out, _ in results] == [
        (0, f"already complete: {last} steps in {tmp_path / 'run'}; raise run.steps (now {last}) to continue\n"),
        (0, ""),
    ]  # fmt: skip


def test_a_dry_run_draws_a_panel_and_trains_nothing(mixture: str, tmp_path: Path) -> None:
    results = run_ranks([*command(mixture, tmp_path / "run"), "--dry-run"], 1)
    expect_success(results)
    assert "53 samples in 75.0% of" in results[0][1]
    assert (tmp_path / "run/dry_run.png").stat().st_size > 1000
    assert not (tmp_path / "run/metrics.jsonl").exists()


WRONG_STARTS = {
    "wrong key": (["run.step=3"], "unknown key run.step; did you mean run.steps?"),
    "missing set": (["data.shards=absent"], "absent"),
    "no set": (["data.shards=''"], "data.shards is not set"),
    "batch": (["data.global_batch=7", "data.micro_batch=2"], "7 is not a multiple"),
    "unwritable": (["run.dir=/proc/nowhere/run"], "cannot be written"),
    "foreign": (["run.dir=FOREIGN"], "contains no run but other files, such as config.yaml"),
    "weights": (["init.weights=absent"], "init.weights: there is no file or folder absent"),
    "teacher": (["teacher.kind=frozen", "teacher.weights=absent"], "teacher.weights: there is no file or folder"),
    "resume": (["--resume", "absent", "run.seed=1"], "--resume absent has no checkpoint"),
}


def test_a_setup_error_is_one_line_with_exit_status_2_on_every_rank(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "environment.json"):
        (foreign / name).write_text("{}\n")
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # every import becomes a line of the errors
    started = {
        name: start_ranks(
            command(shards, tmp_path / "run", *(word.replace("FOREIGN", str(foreign)) for word in overrides)), 2
        )
        for name, (overrides, _) in WRONG_STARTS.items()
    }
    for name, (_, told) in WRONG_STARTS.items():
        for rank, process in enumerate(started[name]):
            errors = process.communicate(timeout=100)[1]
            lines = [line for line in errors.splitlines() if not line.startswith("import time:")]
            assert process.returncode == 2 and len(lines) == 1, (name, lines)
            prefix = "[rank 1] error: " if rank else "error: "
            assert lines[0].startswith(prefix) and told in lines[0], (name, lines)
            # the error is reported before the slow imports
            assert not re.search(r"\| +(torch|deepspeed)$", errors, re.MULTILINE), name
    assert not (tmp_path / "run").exists()
    assert all((foreign / name).read_text() == "{}\n" for name in ("config.yaml", "metrics.jsonl", "environment.json"))
    assert len(list(foreign.iterdir())) == 3


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_changed_settings_are_refused_at_once_unless_accepted(
    dtype: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, always = tmp_path / "run", ("data.micro_batch=4", f"engine.dtype={dtype}")
    settings = ("run.steps=2", *always)
    expect_success(run_ranks(command(shards, run, "run.steps=1", *always), 1))
    pack(draw_folder(tmp_path / "images", 12), tmp_path / "other", PackOptions())
    other = f"data.shards={tmp_path / 'other'}"
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    started = [
        (start_ranks(command(shards, run, *settings, *overrides), 1)[0], told)
        for overrides, told in (
            (["model.dim=32"], "model.dim is 32, the checkpoint has 16; restore them, or set run.dir"),
            ([other], "digest was"),
            (["optim.clip=1.0"], "optim.clip is 1.0, the checkpoint has 3.0; restore them, or add --accept optim.clip"),
            (["optim.clip=1.0", "optim.eps=1e-7", "--accept", "optim.eps"], "or add --accept optim.clip"),
            (["run.seed=4", "--accept-changes"], "run.seed is 4, the checkpoint has 0"),
            (["run.seed=4", "--accept", "run.seed"], "--accept run.seed: this setting is fixed for a run"),
            ([f"run.dir={tmp_path / 'new'}", "--resume", str(tmp_path / "nothing")], "has no checkpoint"),
            ([f"run.dir={tmp_path / 'new'}", "--resume", str(run), other], "digest was"),
        )
    ]
    for process, told in started:
        errors = process.communicate(timeout=100)[1]
        assert process.returncode == 2 and told in errors.strip().splitlines()[-1]
        assert not re.search(r"\| +(torch|deepspeed)$", errors, re.MULTILINE), told
    monkeypatch.delenv("PYTHONPROFILEIMPORTTIME")
    # the run is unchanged until changes are accepted; then they need not be accepted again
    assert read_resolved(run).run.steps == 1 and read_resolved(run).model.dim == 16
    changes = (*settings, other, "optim.clip=1.0")
    # a start that ends before its first checkpoint changes nothing
    accept = ("--accept", "optim.clip", "data.shards")
    endless = (*accept, "run.steps=1000", "run.checkpoint_every=0")
    (process,) = start_ranks(command(shards, run, *changes, *endless), 1)
    while read_resolved(run).optim.clip != 1.0:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert checkpoint.saved_steps(run) == [1]
    saved = saved_state(checkpoint.step_folder(run, 1))
    assert saved is not None and saved["dtype"] == dtype
    expect_success(run_ranks(command(shards, run, *settings, "--dry-run"), 1))
    results = run_ranks(command(shards, run, *changes, *accept), 1)
    expect_success(results)
    accepted = r"^resuming with accepted changes: optim.clip is 1.0, the checkpoint has 3.0; digest was"
    assert re.search(accepted, results[0][1], re.MULTILINE)
    expect_success(run_ranks(command(shards, run, *changes, "run.steps=3"), 1))
    assert [record["slot"] for record in losses(run).values()] == [4, 8, 12]
    # a run whose checkpoints are all damaged is an error
    for step in checkpoint.saved_steps(run):
        (checkpoint.step_folder(run, step) / checkpoint.SHARED_NAME).unlink()
    ((code, _, errors),) = run_ranks(command(shards, run, *changes, "run.steps=4"), 1)
    assert code == 2 and "delete this directory" in errors.strip().splitlines()[-1]
