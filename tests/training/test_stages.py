"""Later stages in real processes: Gram loss with mixed sizes, killed and resumed; anchor; distillation."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from drawn_images import draw_folder
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_backbone import tiny_weights
from tiny_run import command, kill_and_resume, logged

from shards.packing.pack import PackOptions, pack
from streamtrain.checkpoint import reader as checkpoint
from streamtrain.reporting.metrics import read_metrics

GRAM = (
    "run.steps=11", "objective.gram.weight={peak: 2.0, delay: 3, warmup: 2}", "objective.gram.size=48",
    "objective.gram.refresh={first: 6, every: 2, limit: 2}", "run.keep_last=3",
    "objective.global_loss.local_weight={start: 1.0, peak: 0.5, delay: 3, warmup: 2}",
    "crops.sizes=[{share: 0.5}, {share: 0.5, global_size: [32, 48], local_size: [16, 8], gram_size: [64, 96]}]",
    "optim.clip_per=module", "optim.clip=1.0",
)  # fmt: skip


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set and a run of three steps."""
    folder = tmp_path_factory.mktemp("stages")
    pack(draw_folder(folder / "images", 24), folder / "set", PackOptions())
    results = run_ranks(command(folder / "set", folder / "run", "run.steps=3"), 2)
    assert [code for code, _, _ in results] == [0, 0], results[0][2][-3000:]
    return folder


@pytest.mark.slow
def test_a_gram_stage_killed_between_refreshes_resumes_bit_for_bit(stage_one: Path, tmp_path: Path) -> None:
    def words(run: str) -> list[str]:
        return [*command(stage_one / "set", tmp_path / run, *GRAM), "--resume", str(stage_one / "run")]

    results = run_ranks(words("straight"), 2)
    assert [code for code, _, _ in results] == [0, 0], results[0][2][-3000:]
    kill_and_resume(words("broken"), tmp_path / "broken", 7)
    straight, broken = logged(tmp_path / "straight"), logged(tmp_path / "broken")
    assert straight == broken and list(straight) == list(range(4, 12))
    ours, theirs = (checkpoint.read_weights(tmp_path / run, 11, "student") for run in ("straight", "broken"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # the weight is 0 in the step after the delay, where the term is not computed
    assert "loss/gram" not in straight[4] and all("loss/gram" in straight[step] for step in range(5, 12))
    assert {"optim/gradient_norm", "optim/gradient_norm/backbone", "optim/gradient_norm/patch_head"} <= set(straight[4])

    # the Gram teacher is the EMA at the last refresh, after 8 steps
    with checkpoint.open_checkpoint(checkpoint.step_folder(tmp_path / "straight", 11)) as reader:
        names = [name for name in reader.state["shapes"] if name.startswith("backbone.")]
        gram = {name: reader.read_full(f"gram/{name}") for name in names}
    with checkpoint.open_checkpoint(checkpoint.step_folder(tmp_path / "straight", 9)) as reader:
        before = {name: reader.read_full(f"gram/{name}") for name in gram}
        average = reader.read_full("ema/backbone.norm.weight")
    assert all(torch.equal(gram[name], before[name]) for name in gram)
    assert not torch.equal(average, gram["backbone.norm.weight"])


@pytest.mark.slow
def test_a_mixed_resolution_stage_sees_each_size_in_its_share(stage_one: Path, tmp_path: Path) -> None:
    """The shares of giant_highres.yaml over forty steps, its sizes scaled down."""
    sizes = {32: (0.3, 48), 40: (0.3, 64), 48: (0.3, 64), 56: (0.05, 72), 64: (0.05, 80)}
    entries = [
        f"{{share: {share}, global_size: {side}, local_size: {16 + 8 * index}, gram_size: {gram}}}"
        for index, (side, (share, gram)) in enumerate(sizes.items())
    ]
    given = [f"crops.sizes=[{', '.join(entries)}]", "run.steps=43", "run.checkpoint_every=0"]
    given += ["objective.gram.weight=1.5", "objective.koleo={distributed: true, group_size: 8}"]
    words = [*command(stage_one / "set", tmp_path / "run", *given), "--resume", str(stage_one / "run")]
    results = run_ranks(words, 2)
    assert [code for code, _, _ in results] == [0, 0], results[0][2][-3000:]
    records = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert all(record["loss/gram"] > 0 for record in records)
    seen = Counter(record["data/global_size"] for record in records)
    assert sum(seen.values()) == 40 and all(abs(seen[side] - 40 * share) <= 1 for side, (share, _) in sizes.items())


def test_a_gram_teacher_from_a_checkpoint_and_one_of_another_model(stage_one: Path, tmp_path: Path) -> None:
    folder = checkpoint.step_folder(stage_one / "run", 2)
    given = ["run.steps=1", "objective.gram.weight=1.0", f"objective.gram.teacher={folder}"]
    ((code, _, errors),) = run_ranks(command(stage_one / "set", tmp_path / "run", *given), 1)
    assert code == 0, errors[-3000:]
    with checkpoint.open_checkpoint(checkpoint.step_folder(tmp_path / "run", 1)) as reader:
        ours = reader.read_full("gram/backbone.blocks.1.mlp.up.weight")
    assert torch.equal(ours, checkpoint.read_weights(stage_one / "run", 2)["backbone.blocks.1.mlp.up.weight"])
    ((code, _, errors),) = run_ranks(command(stage_one / "set", tmp_path / "other", *given, "model.depth=3"), 1)
    assert code == 2 and "set the model section" in errors.strip().splitlines()[-1]


@pytest.mark.slow
def test_an_anchored_run_resumes_bit_for_bit_without_its_weights(stage_one: Path, tmp_path: Path) -> None:
    weights = tiny_weights(tmp_path / "weights")

    def train(run: str) -> None:
        given = [f"init.weights={weights}", "objective.anchor={weight: 2.0, patches: cosine}", "run.steps=4"]
        results = run_ranks(command(stage_one / "set", tmp_path / run, *given), 2)
        assert [code for code, _, _ in results] == [0, 0], results[0][2][-3000:]

    train("straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "broken")
    for step in (3, 4):
        shutil.rmtree(checkpoint.step_folder(tmp_path / "broken", step))
    start = load_file(weights / "model.safetensors")
    for path in weights.iterdir():
        path.unlink()
    train("broken")
    straight, broken = logged(tmp_path / "straight"), logged(tmp_path / "broken")
    assert straight == broken and all(record["loss/anchor"] > 0 for record in straight.values())
    ours, theirs = (checkpoint.read_weights(tmp_path / run, 4, "student") for run in ("straight", "broken"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for step in (2, 4):
        with checkpoint.open_checkpoint(checkpoint.step_folder(tmp_path / "broken", step)) as reader:
            names = [name for name in reader.state["shapes"] if name.startswith("backbone.")]
            anchor = {name: reader.read_full(f"anchor/{name}") for name in names}
        assert all(torch.equal(anchor[f"backbone.{name}"], value) for name, value in start.items())
    assert not torch.equal(ours["backbone.norm.weight"], anchor["backbone.norm.weight"])


@pytest.mark.slow
def test_an_anchor_starts_from_another_run_but_never_from_random_weights(stage_one: Path, tmp_path: Path) -> None:
    given = ["run.steps=4", "objective.anchor.weight=1.0"]
    words = [*command(stage_one / "set", tmp_path / "run", *given), "--resume", str(stage_one / "run")]
    ((code, _, errors),) = run_ranks(words, 1)
    assert code == 0, errors[-3000:]
    with checkpoint.open_checkpoint(checkpoint.step_folder(tmp_path / "run", 4)) as reader:
        ours = reader.read_full("anchor/backbone.blocks.1.mlp.up.weight")
    assert torch.equal(ours, checkpoint.read_weights(stage_one / "run", 3)["backbone.blocks.1.mlp.up.weight"])
    for run, ranks, overrides, told in (
        (tmp_path / "no", 1, [], "objective.anchor has no starting network; set init.weights"),
        (tmp_path / "no", 1, ["objective.anchor={cls: none, patches: none}"], "at least one of cls and patches"),
        (stage_one / "run", 2, [], "has no anchor, because the run started without objective.anchor.weight"),
    ):
        words = [*command(stage_one / "set", run, *given, *overrides), "--accept", "objective.anchor.weight"]
        code, _, errors = run_ranks(words, ranks)[0]
        assert code == 2 and told in errors.strip().splitlines()[-1], errors[-2000:]


def test_the_recipe_for_released_weights_names_what_it_needs(stage_one: Path, tmp_path: Path) -> None:
    words = [command("", tmp_path)[0], "--config", "continue.yaml", f"data.shards={stage_one / 'set'}"]
    ((code, _, errors),) = run_ranks([*words, f"run.dir={tmp_path / 'run'}"], 1)
    assert code == 2 and "set init.weights to a backbone" in errors.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_frozen_teacher_trains_a_smaller_student(stage_one: Path, tmp_path: Path) -> None:
    given = [
        "run.steps=3", "model.dim=16", "model.depth=1", "teacher.kind=frozen", f"teacher.weights={stage_one / 'run'}",
    ]  # fmt: skip
    results = run_ranks(command(stage_one / "set", tmp_path / "run", *given), 2)
    assert [code for code, _, _ in results] == [0, 0], results[0][2][-3000:]
    assert all(record["loss/patch"] > 0 for record in logged(tmp_path / "run").values())
    # the checkpoint has the student's EMA, for export and evaluation
    assert checkpoint.read_weights(tmp_path / "run")["backbone.norm.weight"].shape == (16,)
    for overrides, told in (
        (["objective.global_loss.head.prototypes=33"], "objective.global_loss.head.prototypes is 33, but the teacher"),
        (["objective.patch_loss.kind=cosine"], "model.dim is 16, but the teacher"),
        ([f"teacher.weights={tmp_path / 'absent'}"], "teacher.weights: there is no file or folder"),
        (["masks.probability=0.4"], "masks has no effect with teacher.kind: frozen"),
        (["teacher.kind=ema"], "weights has an effect only with kind: frozen"),
    ):
        ((code, _, errors),) = run_ranks(command(stage_one / "set", tmp_path / "no", *given, *overrides), 1)
        assert code == 2 and told in errors.strip().splitlines()[-1], errors[-2000:]
