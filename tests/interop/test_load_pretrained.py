"""Pretrained weights in every supported format are read tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_backbone import tiny_backbone

from streamtrain.errors import StreamtrainError
from streamtrain.interop.folder import export_safetensors
from streamtrain.interop.hf import export_hf
from streamtrain.interop.load_pretrained import load_pretrained_backbone
from streamtrain.interop.naming import to_timm
from streamtrain.interop.timm_folder import export_timm


def as_sharded_hf(folder: Path) -> Path:
    """Write several files and an index, as larger models on the Hugging Face Hub have."""
    from transformers import AutoModel

    backbone = tiny_backbone()
    export_hf(backbone.model, backbone.config, folder / "whole")
    AutoModel.from_pretrained(folder / "whole").save_pretrained(folder / "pieces", max_shard_size="20KB")
    assert len(list((folder / "pieces").glob("*.safetensors"))) > 1
    return folder / "pieces"


def as_hf(folder: Path) -> Path:
    backbone = tiny_backbone()
    export_hf(backbone.model, backbone.config, folder)
    return folder


def as_timm(folder: Path) -> Path:
    backbone = tiny_backbone()
    export_timm(backbone.model, backbone.config, folder)
    return folder


def as_export(folder: Path) -> Path:
    backbone = tiny_backbone()
    export_safetensors(backbone.model, backbone.config, folder)
    return folder


def as_file(folder: Path) -> Path:
    save_file({name: value.contiguous() for name, value in to_timm(tiny_backbone().model.state_dict()).items()},
              folder / "timm.safetensors")  # fmt: skip
    return folder / "timm.safetensors"


def as_torch(folder: Path) -> Path:
    state = {f"backbone.{name}": value for name, value in tiny_backbone().model.state_dict().items()}
    torch.save({"teacher": state, "step": 7}, folder / "weights.pth")
    return folder / "weights.pth"


def as_old_torch(folder: Path) -> Path:
    torch.save(tiny_backbone().model.state_dict(), folder / "weights.pt", _use_new_zipfile_serialization=False)
    return folder / "weights.pt"


@pytest.mark.parametrize("make", [as_sharded_hf, as_hf, as_timm, as_export, as_file, as_torch, as_old_torch])
def test_every_format_gives_the_same_tensors(make: object, tmp_path: Path) -> None:
    if "hf" in make.__name__:
        pytest.importorskip("transformers", reason="transformers is not installed")
    path = make(tmp_path)
    wanted = tiny_backbone().model.state_dict()
    with load_pretrained_backbone(path, {name: value.shape for name, value in wanted.items()}) as (read, report):
        assert set(report.missing) <= {"embedding.mask_token"} and not report.reshaped and not report.unexpected
        for name, value in wanted.items():
            found = read(name)
            assert (name in report.missing) if found is None else torch.equal(found, value), name


def test_each_error_is_one_line(tmp_path: Path) -> None:
    shapes = {name: value.shape for name, value in tiny_backbone().model.state_dict().items()}
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10")
    torch.save([1, 2], tmp_path / "list.pth")
    other = tiny_backbone(dim=64)
    export_safetensors(other.model, other.config, tmp_path / "other")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cloned").mkdir()
    for name in ("pointer.pth", "cloned/model.safetensors"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    for name, words in {
        "absent": "cannot be read", "text.pth": "cannot be read", "torn.safetensors": "cannot be read",
        "list.pth": "no vision transformer", "pointer.pth": "git lfs pull", "cloned": "git lfs pull",
        "empty": "neither a run with a checkpoint", "other": "set the model section",
    }.items():  # fmt: skip
        with pytest.raises(StreamtrainError, match=words) as caught, load_pretrained_backbone(tmp_path / name, shapes):
            pass
        assert "\n" not in str(caught.value), name
    with load_pretrained_backbone(tmp_path / "other", shapes, minimum=0.0) as (_, report):
        assert len(report.reshaped) > 0 and report.share < 0.95
