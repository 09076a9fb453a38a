"""Runs that start from a pretrained backbone: matched weights, frozen steps, mismatches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from drawn_images import draw_folder
from ranks import run_ranks
from safetensors.torch import save_file
from tiny_backbone import tiny_backbone, tiny_weights
from tiny_run import command

from shards.packing.pack import PackOptions, pack
from streamtrain.checkpoint import reader as checkpoint
from streamtrain.interop.folder import export_safetensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("init")
    pack(draw_folder(folder / "images", 12), folder / "set", PackOptions())
    backbone = tiny_backbone()
    export_safetensors(backbone.model, backbone.config, folder / "weights")
    return folder


def test_both_networks_start_from_the_weights_and_a_frozen_backbone_stays(folder: Path) -> None:
    begin = [f"init.weights={folder / 'weights'}", "init.freeze_backbone_steps=2"]
    ((code, out, err), _) = run_ranks(command(folder / "set", folder / "run", "run.steps=3", *begin), 2)
    assert code == 0, err[-3000:]
    assert f"backbone from {folder / 'weights'}: matched 35 tensors (100.0% of the backbone's)" in out
    wanted = tiny_backbone().model.state_dict()
    # two steps with a learning rate of 0, so that both networks keep their initial values
    for which in ("teacher", "student"):
        state = checkpoint.read_weights(folder / "run", 2, which)
        for name, value in wanted.items():
            torch.testing.assert_close(state[f"backbone.{name}"], value, rtol=0, atol=1e-7)
    first, second, third = (checkpoint.read_weights(folder / "run", step, "student") for step in (1, 2, 3))
    head = "global_head.projection.layers.0.weight"
    assert not torch.equal(first[head], second[head])
    assert not torch.equal(second["backbone.norm.weight"], third["backbone.norm.weight"])
    # a resumed run does not need the weights
    begin = [f"init.weights={folder / 'absent'}", "init.freeze_backbone_steps=2", "run.steps=4"]
    assert [code for code, _, _ in run_ranks(command(folder / "set", folder / "run", *begin), 2)] == [0, 0]


@pytest.fixture(scope="module")
def wrong(folder: Path) -> dict[str, Path]:
    """Weights by name: of DINOv2, as transformers and Meta save them, and of another width."""
    layer = {f"encoder.layer.0.attention.attention.{part}.weight": torch.ones(32, 32) for part in ("query", "key")}
    (folder / "dinov2").mkdir()
    (folder / "dinov2" / "config.json").write_text(json.dumps({"model_type": "dinov2", "hidden_size": 32}))
    save_file({"embeddings.position_embeddings": torch.ones(1, 5, 32), **layer}, folder / "dinov2/model.safetensors")
    meta = {"pos_embed": torch.ones(1, 5, 32), "patch_embed.proj.weight": torch.ones(32, 3, 8, 8)}
    torch.save(meta | {"blocks.0.attn.qkv.weight": torch.ones(96, 32)}, folder / "dinov2.pth")
    wide = tiny_weights(folder / "wide", dim=64)
    return {"dinov2": folder / "dinov2", "dinov2.pth": folder / "dinov2.pth", "wide": wide, "tiny": folder / "weights"}


POSITIONS = "it has position embeddings"
FROZEN = "teacher.kind=frozen"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["init.weights=dinov2"], f"init.weights: dinov2 is of another architecture: {POSITIONS}"),
        pytest.param(["init.weights=dinov2.pth"], f"init.weights: dinov2.pth is of another architecture: {POSITIONS}",
                     marks=pytest.mark.slow),
        (["init.weights=wide"], "init.weights: wide has a patch embedding of [64, 192], but this model needs [32, "),
        (["init.weights=tiny", "model.num_heads=1"], "init.weights: weights has model.num_heads 2, not 1; "),
        pytest.param(["model.num_heads=1", "objective.gram.weight=1.0", "objective.gram.teacher=tiny"],
                     "objective.gram.teacher: weights has model.num_heads 2, not 1; ", marks=pytest.mark.slow),
        pytest.param(["init.weights=tiny", "objective.gram.weight=1.0", "objective.gram.teacher=wide"],
                     "objective.gram.teacher: wide has a patch embedding of [64, 192]", marks=pytest.mark.slow),
        (["init.weights=tiny", "model.lora={rank: 4, blocks: 2, free_blocks: 1}"], "than depth 2; lower one of them"),
        (["init.weights=tiny", "model.lora={rank: 4, free_blocks: 2}"], "depth is 2; lower it"),
        ([FROZEN], "teacher.kind: frozen needs teacher.weights, a run directory or a backbone"),
        (["teacher.weights=tiny"], "teacher: weights has an effect only with kind: frozen"),
        ([FROZEN, "teacher.weights=dinov2"], f"teacher.weights: dinov2 is of another architecture: {POSITIONS}"),
        ([FROZEN, "teacher.weights=absent"], "teacher.weights: there is no file or folder absent"),
    ],
)  # fmt: skip
def test_starts_that_cannot_work_end_in_one_line(
    settings: list[str], message: str, folder: Path, wrong: dict[str, Path], tmp_path: Path
) -> None:
    pairs = [setting.partition("=") for setting in settings]
    given = [f"{key}={wrong.get(value, value)}" for key, _, value in pairs]
    ((code, _, errors),) = run_ranks(command(folder / "set", tmp_path / "run", "run.steps=1", *given), 1)
    *others, last = errors.replace(f"{folder}/", "").strip().splitlines()
    assert code == 2 and message in last and last.startswith("error: "), errors
    assert all(line.startswith("warning: ") for line in others)


def test_weights_that_do_not_fit_stop_every_rank_in_one_line(folder: Path) -> None:
    given = [f"init.weights={folder / 'weights'}", "run.steps=1", "model.depth=3"]
    for code, _, errors in run_ranks(command(folder / "set", folder / "refused", *given), 2):
        assert code == 2 and "set the model section" in errors.strip().splitlines()[-1] and "Traceback" not in errors
