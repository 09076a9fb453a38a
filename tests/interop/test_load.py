from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sealed import seal
from tiny_backbone import tiny_backbone, tiny_config, tiny_weights

from streamtrain.checkpoint.reader import SHARED_NAME, STATE_NAME, VERSION, step_folder
from streamtrain.config.load import to_yaml
from streamtrain.data.still_images import centre_crop
from streamtrain.errors import StreamtrainError
from streamtrain.interop.load import load_backbone, load_run, load_untrained, load_weights


def test_an_export_and_its_weights_file_load_bit_for_bit(tmp_path: Path) -> None:
    before = tiny_backbone(mlp="swiglu", mlp_hidden=48, untied_norms="local_cls")
    folder = tiny_weights(tmp_path / "out", mlp="swiglu", mlp_hidden=48, untied_norms="local_cls")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((folder / "model.safetensors").read_bytes())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    for source in (folder, alone):
        after = load_weights(source)
        assert after.config == before.config
        state = after.model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in before.model.state_dict().items())
        assert not after.model.training and not any(p.requires_grad for p in after.model.parameters())


def write_checkpoint(run: Path, step: int, world_size: int) -> None:
    """Write a run's checkpoint, with its parameters in flat fragments of any number of ranks."""
    config = tiny_config()
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(to_yaml(config))
    folder = step_folder(run, step)
    folder.mkdir(parents=True)
    state = {f"backbone.{name}": value for name, value in load_untrained(config).model.state_dict().items()}
    state["global_head.prototypes.weight"] = torch.zeros(4, 4)
    fragments: list[dict[str, torch.Tensor]] = [{} for _ in range(world_size)]
    for name, value in state.items():
        numel = -(-value.numel() // world_size)
        for kind, add in (("ema", step), ("master", -step)):
            flat = torch.zeros(numel * world_size)
            flat[: value.numel()] = value.flatten() + add
            for rank in range(world_size):
                fragments[rank][f"{kind}/{name}"] = flat[rank * numel : (rank + 1) * numel].clone()
    for rank, tensors in enumerate(fragments):
        save_file(tensors, folder / f"rank-{rank:05d}-of-{world_size:05d}.safetensors")
    save_file({}, folder / SHARED_NAME)
    shapes = {name: list(value.shape) for name, value in state.items()}
    document = {"version": VERSION, "step": step, "world_size": world_size, "shapes": shapes}
    (folder / STATE_NAME).write_text(json.dumps(document))
    seal(folder)


@pytest.mark.parametrize("world_size", [1, 3])
def test_teacher_and_student_of_a_run_are_loaded(world_size: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5, world_size)
    write_checkpoint(tmp_path, 10, world_size)
    initial = load_untrained(tiny_config()).model.state_dict()
    for step, which, add in ((None, "teacher", 10), (5, "teacher", 5), (10, "student", -10)):
        backbone = load_run(tmp_path, step, which)
        assert backbone.config.origin["step"] == abs(add) and backbone.config.origin["source"] == which
        for name, value in backbone.model.state_dict().items():
            torch.testing.assert_close(value, initial[name] + add)
    with pytest.raises(StreamtrainError, match="no checkpoint of step 7"):
        load_run(tmp_path, 7)


def test_each_load_error_is_one_line(tmp_path: Path) -> None:
    folder = tiny_weights(tmp_path / "out")
    weights = load_file(folder / "model.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    for path, words in (
        (tmp_path / "nowhere", "neither"),
        (tmp_path / "text.safetensors", "cannot be read"),
        (tmp_path / "foreign.safetensors", "does not describe its model"),
    ):
        with pytest.raises(StreamtrainError, match=words):
            load_weights(path)
    weights["more"] = weights.pop("norm.weight")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(StreamtrainError, match="contains more"):
        load_weights(folder)
    del weights["more"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(StreamtrainError, match=r"lacks 1 of \d+ tensors, such as norm\.weight"):
        load_weights(folder)
    (folder / "config.json").write_text('{"model": {"dim": "wide"}}')
    with pytest.raises(StreamtrainError, match=r"model\.dim"):
        load_weights(folder)
    with pytest.raises(StreamtrainError, match="not a run directory"):
        load_run(tmp_path)


def test_load_backbone_accepts_runs_and_exports(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", 5, 1)
    write_checkpoint(tmp_path / "run", 10, 1)
    assert load_backbone(str(tmp_path / "run")).config.origin["step"] == 10
    assert load_backbone(tmp_path / "run", 5, "student").config.origin["source"] == "student"
    with pytest.raises(StreamtrainError, match="no best checkpoint"):
        load_backbone(tmp_path / "run", "best")
    folder = tiny_weights(tmp_path / "out")
    assert load_backbone(folder).config.model.dim == 32
    with pytest.raises(StreamtrainError, match="is not a run directory"):
        load_backbone(folder, 5)


def test_a_backbone_preprocesses_and_computes_features(tmp_path: Path) -> None:
    backbone = tiny_backbone()
    assert isinstance(backbone, torch.nn.Module) and not backbone.training
    pixels = np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    inputs = backbone.preprocess([tmp_path / "image.png", Image.fromarray(pixels), pixels])
    assert inputs.shape == (3, 3, 32, 32) and inputs.dtype == torch.float32
    assert torch.equal(inputs[0], inputs[1]) and torch.equal(inputs[0], inputs[2])
    crop = torch.from_numpy(centre_crop(Image.fromarray(pixels), 32, 32))
    mean, std = (torch.tensor(values) for values in (backbone.config.mean, backbone.config.std))
    torch.testing.assert_close(inputs[0].permute(1, 2, 0), (crop / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    features = backbone.forward_features(inputs)
    assert features.cls.shape == (3, 32) and features.registers.shape == (3, 4, 32)
    assert features.patches.shape == (3, 16, 32)
    assert torch.equal(backbone(inputs).cls, features.cls) and not features.cls.requires_grad
    assert backbone.preprocess(str(tmp_path / "image.png"), 48).shape == (1, 3, 48, 48)
    assert backbone.bfloat16().preprocess(pixels).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="size 30 is not a multiple of the patch size 8"):
        backbone.preprocess(pixels, 30)
    with pytest.raises(ValueError, match=r"values of float64, the network takes 3 channels of uint8"):
        backbone.preprocess(pixels / 255)
    with pytest.raises(StreamtrainError, match=r"cannot read the image .*nothing\.png"):
        backbone.preprocess(tmp_path / "nothing.png")
