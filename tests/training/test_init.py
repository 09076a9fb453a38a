"""Runs that start from a pretrained backbone: matched weights, frozen steps, mismatches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from drawn_images import draw_folder
from ranks import run_ranks
from tiny_backbone import tiny_backbone
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


def test_weights_that_do_not_fit_stop_every_rank_in_one_line(folder: Path) -> None:
    given = [f"init.weights={folder / 'weights'}", "run.steps=1", "model.depth=3"]
    for code, _, errors in run_ranks(command(folder / "set", folder / "refused", *given), 2):
        assert code == 2 and "set the model section" in errors.strip().splitlines()[-1] and "Traceback" not in errors
