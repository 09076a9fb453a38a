from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sealed import seal
from tiny_backbone import tiny_backbone, tiny_config, tiny_weights

from streamtrain.checkpoint.reader import SHARED_NAME, STATE_NAME, VERSION, step_folder
from streamtrain.config.load import to_yaml
from streamtrain.errors import StreamtrainError
from streamtrain.interop.load import load_run, load_untrained, load_weights


def test_our_folder_and_its_one_file_come_back_bit_for_bit(tmp_path: Path) -> None:
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
    """A checkpoint as a run leaves it, its parameters cut into flat fragments for any number of ranks."""
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
def test_teacher_and_student_of_a_run(world_size: int, tmp_path: Path) -> None:
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


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path) -> None:
    folder = tiny_weights(tmp_path / "out")
    weights = load_file(folder / "model.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    for path, words in (
        (tmp_path / "nowhere", "neither"),
        (tmp_path / "text.safetensors", "cannot be read"),
        (tmp_path / "foreign.safetensors", "does not say what model it is"),
    ):
        with pytest.raises(StreamtrainError, match=words):
            load_weights(path)
    weights["more"] = weights.pop("norm.weight")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(StreamtrainError, match="holds more"):
        load_weights(folder)
    del weights["more"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(StreamtrainError, match=r"lacks 1 of \d+ tensors, such as norm\.weight"):
        load_weights(folder)
    (folder / "config.json").write_text('{"model": {"dim": "wide"}}')
    with pytest.raises(StreamtrainError, match=r"model\.dim"):
        load_weights(folder)
    with pytest.raises(StreamtrainError, match="not a run folder"):
        load_run(tmp_path)
