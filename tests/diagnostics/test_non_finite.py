"""Non-finite losses and gradients in real runs: such a step changes nothing on any rank and is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from drawn_images import packed_set
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_run import command

from streamtrain.checkpoint import reader as checkpoint

SCRIPT = Path(__file__).with_name("poisoned_run.py")
SETTINGS = ("data.global_batch=16", "objective.centering=softmax")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_set(tmp_path_factory.mktemp("numbers"), 24).path


def poisoned(plan: dict[str, object], words: list[str], ranks: int = 2) -> list[tuple[int, str, str]]:
    return run_ranks([SCRIPT, json.dumps(plan), *words[1:], *SETTINGS], ranks)


def state_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the whole masters, moments and EMA, and the softmax centres."""
    folder = checkpoint.step_folder(run, step)
    with checkpoint.open_checkpoint(folder) as reader:
        kinds = ("master", "exp_avg", "exp_avg_sq", "ema")
        keys = [f"{kind}/{name}" for kind in kinds for name in reader.state["shapes"]]
        whole = {key: reader.read_full(key) for key in keys}
    return whole | {f"centre/{name}": value for name, value in load_file(folder / checkpoint.SHARED_NAME).items()}


@pytest.mark.parametrize("clip_per", ["global", pytest.param("module", marks=pytest.mark.slow)])
def test_training_continues_after_a_non_finite_step_with_a_rank_of_padding_only(
    clip_per: str, shards: Path, tmp_path: Path
) -> None:
    words = command(shards, tmp_path / "run", "run.steps=3")
    small = ("model.dim=4", "model.num_heads=1", "data.global_batch=12", "objective.centering=softmax")
    plan = json.dumps({"what": "loss", "rank": 2, "steps": [2]})
    results = run_ranks([SCRIPT, plan, *words[1:], *small, f"optim.clip_per={clip_per}"], 3)
    assert [(code, out.splitlines()[-1:]) for code, out, _ in results] == [(0, ["updates {2}"])] * 3, results[0][2]
    (line,) = step_warnings(results[0][2])
    assert line.startswith("warning: step 2 was skipped because a loss is not finite; see ")


def step_warnings(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("warning: step")]


def test_a_non_finite_gradient_on_one_rank_changes_nothing_on_any_rank(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # the last step of a run is saved even if it was skipped
    words = command(shards, run, "run.steps=3")
    results = poisoned({"what": "gradient", "rank": 1, "steps": [3]}, words)
    assert [(code, out.splitlines()[-1:]) for code, out, _ in results] == [(0, ["updates {2}"])] * 2, results[0][2]
    before, after = state_of(run, 2), state_of(run, 3)
    assert before.keys() == after.keys() and len(before) > 100 and any(name.startswith("centre/") for name in before)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    earlier = state_of(run, 1)
    assert sum(torch.equal(before[name], earlier[name]) for name in before) < 20

    record = run / "anomalies" / "step-000000003.json"
    expected = f"warning: step 3 was skipped because the gradient is not finite; see {record}"
    assert step_warnings(results[0][2]) == [expected]
    assert step_warnings(results[1][2]) == []
    document = json.loads(record.read_text())
    assert document["not_finite"] == "gradient" and document["in_a_row"] == document["skipped"] == 1
    images = [image for rank in document["ranks"] for image in rank["images"]]
    assert [image["slot"] for image in images] == list(range(32, 48))
    assert all(image["shard"].endswith(".tar") and image["key"] and image["index"] >= 0 for image in images)
    assert [part["slots"] for part in document["ranks"][1]["micro_batches"]] == [[40, 43], [44, 47]]
    assert document["ranks"][0]["micro_batches"][0]["global_crops"]["count"] == 8

    # resume with the correct number of updates; a non-finite loss with finite gradients is detected too
    words = command(shards, run, "run.steps=6", "run.checkpoint_every=4")
    results = poisoned({"what": "loss", "rank": 0, "steps": [4]}, words)
    assert [(code, out.splitlines()[-1:]) for code, out, _ in results] == [(0, ["updates {4}"])] * 2, results[0][2]
    # no checkpoint is saved at a skipped step
    assert not checkpoint.step_folder(run, 4).exists() and checkpoint.step_folder(run, 6).exists()
    document = json.loads((run / "anomalies" / "step-000000004.json").read_text())
    assert document["not_finite"] == "loss" and document["ranks"][1]["images"] == []
    assert document["ranks"][0]["micro_batches"][0]["losses"]["total"] == "inf"
    assert [image["slot"] for image in document["ranks"][0]["images"]] == list(range(48, 56))
    lines = {line["step"]: line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    assert [lines[step]["optim/skipped_steps"] for step in sorted(lines)] == [0, 0, 1, 2, 2, 2]
    assert lines[3]["optim/gradient_norm"] is None and lines[3]["loss/total"] and lines[4]["loss/total"] is None


@pytest.mark.slow
def test_too_many_non_finite_steps_in_a_row_end_the_run(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = command(shards, run, "run.steps=9", "run.max_bad_steps=2", "optim.clip_per=module")
    results = poisoned({"what": "gradient", "rank": 1, "steps": [2, 4, 5, 6]}, words)
    for prefix, (code, _, errors) in zip(("", "[rank 1] "), results, strict=True):
        last = errors.strip().splitlines()[-1]
        expected = f"{prefix}error: 2 steps in a row, 4 to 5, had a non-finite loss or gradient"
        assert code == 2 and last.startswith(expected)
        assert f"the last good checkpoint is {checkpoint.step_folder(run, 3)}. Inspect {run / 'anomalies'}" in last
    assert len(step_warnings(results[0][2])) == 3


def test_non_finite_weights_are_not_saved(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = command(shards, run, "run.steps=9", "data.micro_batch=16")
    # changed after the gradient check, like a memory fault
    ((code, _, errors),) = poisoned({"what": "weight", "rank": 0, "steps": [3]}, words, 1)
    last = errors.strip().splitlines()[-1]
    assert code == 2 and "weights after step 3 are not finite and were not saved" in last
    assert str(checkpoint.step_folder(run, 2)) in last and not checkpoint.step_folder(run, 3).exists()
