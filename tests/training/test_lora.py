"""Runs with LoRA adapters: frozen base, exact resume, checkpoints, export, evaluation, and errors at the start."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from drawn_images import draw_folder
from ranks import run_ranks
from safetensors import safe_open
from tiny_backbone import class_folder, tiny_backbone, tiny_weights
from tiny_run import command, kill_and_resume, logged

from shards.packing.pack import PackOptions, pack
from streamtrain.checkpoint import reader as checkpoint
from streamtrain.cli.main import main as streamtrain
from streamtrain.interop.load import load_backbone
from streamtrain.run.directory import SNAPSHOTS

LORA = ("model.lora={rank: 4, alpha: 8, blocks: 1, free_blocks: 1}", "model.depth=3", "run.snapshot_every=3")
DEPTH = {"depth": 3}
LAYERS = ("attention.qkv", "attention.proj", "mlp.up", "mlp.down")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    pack(draw_folder(folder / "images", 40), folder / "set", PackOptions())
    tiny_weights(folder / "weights", **DEPTH)
    return folder


def words(folder: Path, run: Path, *settings: str) -> list[str]:
    return command(folder / "set", run, f"init.weights={folder / 'weights'}", *LORA, *settings)


def expect_success(results: Sequence[tuple[int, str, str]]) -> None:
    assert [code for code, _, _ in results] == [0] * len(results), "\n".join(err[-3000:] for _, _, err in results)


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """Return the directory of a run of 6 steps on 2 ranks, with an evaluation."""
    train, test = class_folder(folder / "train"), class_folder(folder / "test")
    evaluation = (
        f"evaluation.train={train}",
        f"evaluation.test={test}",
        "evaluation.every=3",
        "run.checkpoint_every=2",
    )
    expect_success(run_ranks(words(folder, folder / "run", "run.steps=6", *evaluation), 2))
    return folder / "run"


def test_base_stays_and_adapters_train(run: Path) -> None:
    wanted = tiny_backbone(**DEPTH).model.state_dict()
    teacher, student = (checkpoint.read_weights(run, which=which) for which in ("teacher", "student"))
    for name, value in wanted.items():
        name, is_free = f"backbone.{name}", name.startswith("blocks.2.")
        assert is_free or (torch.equal(student[name], value) and torch.equal(teacher[name], value)), name
        assert not is_free or not torch.equal(student[name], teacher[name]), name
    adapters = {name for name in student if "lora" in name}
    assert adapters == {f"backbone.blocks.1.{layer}.lora_{part}" for layer in LAYERS for part in "ab"}
    assert all(student[name].any() and not torch.equal(student[name], teacher[name]) for name in adapters)


def test_a_frozen_parameter_is_stored_once(run: Path) -> None:
    (file,) = (checkpoint.step_folder(run, 6)).glob("rank-00000-*")
    with safe_open(file, "pt") as saved:
        keys = set(saved.keys())
    frozen = {key.partition("/")[2] for key in keys if key.startswith("frozen/")}
    assert "backbone.embedding.projection.weight" in frozen and "backbone.blocks.1.norm1.weight" in frozen
    kinds = {kind: {key.partition("/")[2] for key in keys if key.startswith(f"{kind}/")} for kind in ("master", "ema")}
    assert kinds["master"] == kinds["ema"] and not frozen & kinds["master"]
    assert "backbone.blocks.1.attention.qkv.lora_a" in kinds["master"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_resumes_bit_for_bit(ranks: int, folder: Path, tmp_path: Path) -> None:
    settings = ("run.steps=8", "run.checkpoint_every=2", "data.global_batch=8", "objective.anchor.weight=1.0")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    expect_success(run_ranks(words(folder, straight, *settings), ranks))
    kill_and_resume(words(folder, broken, *settings), broken, 2, ranks)
    losses = logged(straight)
    assert logged(broken) == losses and 0 < losses[1]["loss/anchor"] < losses[8]["loss/anchor"]
    # the anchor shares the frozen parameters
    (file,) = (checkpoint.step_folder(straight, 8)).glob("rank-00000-*")
    with safe_open(file, "pt") as saved:
        keys = [key.partition("/") for key in saved.keys()]  # noqa: SIM118 - not a dict
    anchor, trained = ({name for kind, _, name in keys if kind == wanted} for wanted in ("anchor", "master"))
    assert anchor == {name for name in trained if name.startswith("backbone.")}
    for which in ("teacher", "student"):
        ours, theirs = (checkpoint.read_weights(each, which=which) for each in (broken, straight))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def merged(run: Path, which: str = "teacher") -> dict[str, torch.Tensor]:
    """Return the backbone with adapters merged by plain arithmetic."""
    state = {name.removeprefix("backbone."): value for name, value in checkpoint.read_weights(run, which=which).items()}
    for layer in LAYERS:
        name = f"blocks.1.{layer}"
        a, b = state.pop(f"{name}.lora_a"), state.pop(f"{name}.lora_b")
        state[f"{name}.weight"] = state[f"{name}.weight"] + 2.0 * (b @ a)
    return {name: value for name, value in state.items() if not name.startswith(("global_head", "patch_head"))}


def test_exports_are_merged_and_adapters_are_exported_alone(run: Path, tmp_path: Path) -> None:
    expected = merged(run)
    assert streamtrain(["export", "--run", str(run), "--to", "safetensors", "--out", str(tmp_path / "out")]) == 0
    for source in (run, tmp_path / "out"):
        state = load_backbone(source).model.state_dict()
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-7)
    assert not torch.equal(load_backbone(run, which="student").model.state_dict()["blocks.1.mlp.up.weight"],
                           expected["blocks.1.mlp.up.weight"])  # fmt: skip

    file = tmp_path / "adapters.safetensors"
    assert streamtrain(["export", "--run", str(run), "--adapters", "--out", str(file)]) == 0
    with safe_open(file, "pt") as saved:
        lora = json.loads(saved.metadata()["lora"])
        tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118 - not a dict
    assert (lora["rank"], lora["alpha"], lora["free_blocks"]) == (4, 8.0, 1)
    # apply them to the released weights in plain torch
    state = tiny_backbone(**DEPTH).model.state_dict()
    state |= {name: value for name, value in tensors.items() if "lora" not in name}
    for name in [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]:
        product = tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"]
        state[f"{name}.weight"] += lora["alpha"] / lora["rank"] * product
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-7)
    assert streamtrain(["export", "--run", str(run), "--adapters", "--out", str(file)]) == 2


@pytest.mark.slow
def test_a_run_and_a_snapshot_are_initial_weights(folder: Path, run: Path, tmp_path: Path) -> None:
    snapshot = checkpoint.step_folder(run, 6, SNAPSHOTS)
    for number, source in enumerate((run, snapshot)):
        settings = ("run.steps=1", "model.depth=3", f"init.weights={source}", "init.freeze_backbone_steps=1")
        expect_success(run_ranks(command(folder / "set", tmp_path / str(number), *settings), 1))
        state = checkpoint.read_weights(tmp_path / str(number))
        for name, value in merged(run).items():
            torch.testing.assert_close(state[f"backbone.{name}"], value, rtol=1e-5, atol=1e-6)


def test_a_network_with_adapters_is_evaluated_while_training(run: Path) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # evaluation.max_share may skip the second one
    assert next(record["step"] for record in records if "eval/knn_20" in record) == 3


@pytest.mark.slow
def test_a_gram_teacher_of_released_weights_has_adapters_of_zero(folder: Path, tmp_path: Path) -> None:
    gram = (f"objective.gram.teacher={folder / 'weights'}", "objective.gram.weight=1.0")
    expect_success(run_ranks(words(folder, tmp_path / "run", "run.steps=1", *gram), 2))
    ema = ("objective.gram.weight=1.0", "objective.gram.refresh={first: 0, every: 1}")
    expect_success(run_ranks(words(folder, tmp_path / "ema", "run.steps=2", *ema), 1))
    # before the first step every adapter is 0
    assert logged(tmp_path / "run")[1]["loss/gram"] < 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["init.weights=null"], "set init.weights, or model.lora.rank=0"),
        (["model.untied_norms=local_cls", "init.minimum_matched=0.5"], "model.lora freezes local_norm.weight"),
    ],
)
def test_starts_that_cannot_work_end_in_one_line(
    changes: list[str], message: str, folder: Path, tmp_path: Path
) -> None:
    ((code, _, errors),) = run_ranks(words(folder, tmp_path / "run", "run.steps=1", *changes), 1)
    assert code == 2 and message in errors.strip().splitlines()[-1] and "Traceback" not in errors
