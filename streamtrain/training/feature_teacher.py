"""A frozen backbone without heads as the teacher, of any width, depth and patch size."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch, normalise
from streamtrain.engine.fragments import Fragment
from streamtrain.engine.teacher import FrozenNetwork
from streamtrain.errors import StreamtrainError
from streamtrain.interop.feature_teacher import describe_backbone
from streamtrain.interop.folder import BackboneConfig
from streamtrain.interop.load_pretrained import load_pretrained_backbone
from streamtrain.model.factory import build_backbone
from streamtrain.objective.gram import resize_patches
from streamtrain.objective.targets import TeacherFeatures
from streamtrain.training.ssl_model import LossWeights

BACKBONE = "backbone."
# parameters that do not affect the features of unmasked global crops
_UNUSED = ("embedding.mask_token", "local_norm.weight", "local_norm.bias")


def describe_teacher(config: Config) -> BackboneConfig:
    """Return ``teacher.model`` with the preprocessing of ``teacher.weights``; errors as in ``describe_backbone``."""
    assert config.teacher.weights is not None
    return describe_backbone(Path(config.teacher.weights), config.model.factory, config.teacher.backbone)


class FeatureTeacher(nn.Module):
    """The backbone ``teacher.model``; it sees the student's global crops with its own normalisation."""

    def __init__(self, config: Config, description: BackboneConfig) -> None:
        """``description``: of the teacher, from ``describe_teacher``."""
        super().__init__()
        self._mean, self._std, self._range = description.mean, description.std, description.value_range
        self._patch_size, self._chunk = config.model.patch_size, config.teacher.chunk
        self.backbone = build_backbone(description.model)

    @torch.no_grad()
    def forward(self, method: str, batch: Batch, weights: LossWeights) -> TeacherFeatures:
        """Return CLS ``[V * B, dim]`` and patches ``[V * B * num_patches, dim]`` on the student's grid.

        If the patch sizes differ, the patches are resized bicubically to the student's grid.
        """
        assert method == "teacher_features", method
        if not weights.global_loss and not weights.patch_loss:
            return TeacherFeatures(None, None, batch.masks.weight)
        crops = batch.global_crops
        dtype = next(self.backbone.parameters()).dtype
        pixels = normalise(crops, self._mean, self._std, dtype, self._range)
        features = self.backbone([pixels], chunk=self._chunk)[0]
        patches = None
        if weights.patch_loss:
            (group,) = self.backbone.layout([pixels]).groups
            grid = (crops.shape[1] // self._patch_size, crops.shape[2] // self._patch_size)
            patches = resize_patches(features.patches, group.grid, grid).flatten(0, 1)
        return TeacherFeatures(features.cls, patches, batch.masks.weight, features.cls)


def fill_feature_teacher(config: Config, network: FrozenNetwork) -> None:
    """Fill ``network`` with the backbone in ``teacher.weights``.

    Raises:
        StreamtrainError: if the weights cannot be read or lack a tensor of ``teacher.model``.
    """
    path = Path(str(config.teacher.weights))
    shapes = {name.removeprefix(BACKBONE): torch.Size(one.shape) for name, one in network.fragments.items()}
    with load_pretrained_backbone(path, shapes, setting="teacher.weights") as (read, report):
        absent = [
            name
            for name in (*report.missing, *report.reshaped, *report.zeroed)
            if shapes[name].numel() and name not in _UNUSED
        ]
        if absent:
            raise StreamtrainError(f"teacher.weights {path} does not fit teacher.model: it lacks {absent[0]}")

        def value(name: str, fragment: Fragment) -> Tensor:
            tensor = read(name.removeprefix(BACKBONE))
            return torch.zeros(fragment.numel) if tensor is None else fragment.cut(tensor)

        network.write(value)
