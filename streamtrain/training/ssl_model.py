"""The network of student and teacher: backbone, heads and losses (Siméoni et al. 2025, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shards.randomness import MODEL, derive_seed
from streamtrain.config.crops import CropsConfig
from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch, normalise
from streamtrain.model.factory import build_backbone
from streamtrain.model.heads import ProjectionHead, Projector
from streamtrain.model.vit import Features, VisionTransformer
from streamtrain.objective.feature_distillation import local_view_loss, same_view_loss
from streamtrain.objective.feature_losses import cosine_loss, distributed_koleo_loss, koleo_loss, l2_loss
from streamtrain.objective.gram import resize_patches
from streamtrain.objective.prototypes import PrototypeTargets
from streamtrain.objective.targets import Targets, TeacherFeatures, view_pairs, view_weights


@dataclass(frozen=True)
class LossWeights:
    """Weights of the loss terms at a step; a term of weight 0 is not computed."""

    global_loss: float = 1.0
    patch_loss: float = 1.0
    koleo: float = 0.1
    # factor of the local views within the global loss
    local_loss: float = 1.0
    gram: float = 0.0
    anchor: float = 0.0


@dataclass(frozen=True)
class StudentFeatures:
    """Normalised backbone features of a micro-batch; None where no loss term needs them."""

    # [V * B, dim] and [L * B, dim]
    global_cls: Tensor
    local_cls: Tensor | None
    # the patches at ``masks.index``, [M, dim]
    masked: Tensor | None
    # all patches of the global crops, [V * B, num_patches, dim]
    patches: Tensor | None


RECIPE_WEIGHTS = LossWeights()


class SSLModel(nn.Module):
    """Backbone and heads; one class for student and teacher, so that both are partitioned identically."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        objective = config.objective
        engine = config.engine
        self.backbone = build_backbone(
            config.model, engine.checkpointing, engine.view_groups, engine.offload_checkpoints
        )
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(config.model.is_trained(name))
        self.global_head: ProjectionHead | None = None
        self.patch_head: ProjectionHead | None = None
        self.projector: Projector | None = None
        if (teacher := config.teacher.backbone) is not None:
            hidden = config.teacher.projector_hidden or teacher.dim
            self.projector = Projector(config.model.dim, teacher.dim, config.teacher.projector_layers, hidden)
            return
        self.global_head = ProjectionHead(config.model.dim, objective.global_loss.head)
        if objective.patch_loss.kind == "ibot":
            self.patch_head = ProjectionHead(config.model.dim, objective.patch_loss.head)

    def forward(self, method: str, *inputs: Any) -> Any:
        """Call ``method`` by name, because the engine gathers parameters and reduces gradients only in ``forward``."""
        return getattr(self, method)(*inputs)

    @torch.no_grad()
    def teacher_features(self, batch: Batch, weights: LossWeights = RECIPE_WEIGHTS) -> TeacherFeatures:
        """Return the teacher's features of one micro-batch: unmasked global crops through backbone and heads.

        Patch features are computed at the student's masked positions, and only if the patch loss has a weight.
        """
        if not weights.global_loss and not weights.patch_loss:
            return TeacherFeatures(None, None, batch.masks.weight)
        crops = [self._pixels(batch.global_crops)]
        layout = self.backbone.layout(crops)
        rows = {"global": layout.cls_rows(0, crops[0].device)}
        if weights.patch_loss:
            rows["masked"] = layout.patch_rows(batch.masks.index)
        features = self._encode(crops, [None], rows, chunk=self.config.teacher.chunk)
        assert self.global_head is not None
        global_features = self.global_head(features["global"]) if weights.global_loss else None
        patch_features = features.get("masked")
        if patch_features is not None and self.patch_head is not None:
            patch_features = self.patch_head(patch_features)
        return TeacherFeatures(global_features, patch_features, batch.masks.weight, features["global"])

    def student_losses(
        self, batch: Batch, targets: Targets, weights: LossWeights = RECIPE_WEIGHTS
    ) -> dict[str, Tensor]:
        """Return the losses of one micro-batch as fp32 scalars.

        ``total`` is weighted and differentiable. The other terms, such as ``global``, are unweighted and detached; a
        term of weight 0 is left out. With a feature teacher ``distil_cls``, ``distil_local`` and ``distil_patch``
        replace ``global`` and ``patch``.
        """
        features = self._student_features(batch, weights)
        factors = {
            "global": weights.global_loss,
            "patch": weights.patch_loss,
            "koleo": weights.koleo,
            "gram": weights.gram,
            "distil_cls": weights.global_loss,
            "distil_local": weights.global_loss * weights.local_loss,
            "distil_patch": weights.patch_loss,
            "anchor": weights.anchor,
        }
        assert any(factors.values()), "all loss terms have weight 0"
        losses = {}
        if self.projector is not None:
            losses = self._distillation_losses(features, targets, weights)
        elif weights.global_loss:
            losses["global"] = self._global_loss(features, targets, weights.local_loss)
        if features.masked is not None and self.projector is None:
            losses["patch"] = self._patch_loss(features.masked, batch, targets)
        if weights.koleo:
            views = features.global_cls.chunk(self.config.crops.global_count)
            losses["koleo"] = torch.stack([self._koleo(view) for view in views]).sum()
        if weights.gram:
            assert targets.gram is not None, "the Gram loss has a weight but no targets"
            assert features.patches is not None
            losses["gram"] = targets.gram(features.patches, batch.masks.grid_mask)
        if weights.anchor:
            assert targets.anchor is not None, "the anchor loss has a weight but no targets"
            losses["anchor"] = targets.anchor(features.global_cls, features.patches)
        total = torch.stack([factors[name] * loss for name, loss in losses.items()]).sum()
        return {"total": total, **{name: loss.detach() for name, loss in losses.items()}}

    def features(self, images: Tensor) -> Features:
        """Return the backbone's normalised features of ``images``, uint8 ``[N, height, width, 3]``, for evaluation."""
        # blocks are compiled for the shapes of a training step only; evaluation images may have any size
        with torch.compiler.set_stance("force_eager"):
            return self.backbone.forward_features(self._pixels(images), self.config.teacher.chunk)

    def _student_features(self, batch: Batch, weights: LossWeights) -> StudentFeatures:
        """Encode all crops in one pass, the global ones masked; only the rows used by a loss term are normalised."""
        crops, masks = [self._pixels(batch.global_crops)], [batch.masks.grid_mask]
        with_local = bool(self.config.crops.local_count and weights.global_loss and weights.local_loss)
        if with_local:
            crops.append(self._pixels(batch.local_crops))
        device = crops[0].device
        seed = derive_seed(self.config.run.seed, MODEL, int(batch.slots[0]))
        generator = torch.Generator(device).manual_seed(seed)
        layout = self.backbone.layout(crops)
        rows = {"global": layout.cls_rows(0, device)}
        with_patches = bool(weights.gram or (weights.anchor and self.config.objective.anchor.patches != "none"))
        if with_patches:
            all_patches = torch.arange(batch.masks.grid_mask.numel(), device=device)
            rows["patches"] = layout.patch_rows(all_patches)
        elif weights.patch_loss:
            rows["masked"] = layout.patch_rows(batch.masks.index)
        if with_local:
            rows["local"] = layout.cls_rows(1, device)
        features = self._encode(crops, [*masks, *[None] * (len(crops) - 1)], rows, generator)
        if with_patches and weights.patch_loss:
            features["masked"] = features["patches"].index_select(0, batch.masks.index)
        patches = features["patches"].unflatten(0, batch.masks.grid_mask.shape) if with_patches else None
        return StudentFeatures(features["global"], features.get("local"), features.get("masked"), patches)

    def _encode(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        rows: dict[str, Tensor],
        generator: torch.Generator | None = None,
        chunk: int = 0,
    ) -> dict[str, Tensor]:
        """Return the normalised features of ``rows`` (token indices by name); each final norm is called once."""
        tokens, _ = self.backbone.encode(crops, masks, generator, chunk, rows=torch.cat(list(rows.values())))
        pieces = dict(zip(rows, tokens.split([len(row) for row in rows.values()]), strict=True))
        norms = {"global": self.backbone.norm_of_cls, "local": self.backbone.norm_of_local_cls}
        features: dict[str, Tensor] = {}
        for norm in dict.fromkeys(norms.get(name, self.backbone.norm) for name in rows):
            parts = {name: piece for name, piece in pieces.items() if norms.get(name, self.backbone.norm) is norm}
            normalised = norm(tokens if len(parts) == len(pieces) else torch.cat(list(parts.values())))
            features |= dict(zip(parts, normalised.split([len(part) for part in parts.values()]), strict=True))
        return features

    def _distillation_losses(
        self, student: StudentFeatures, targets: Targets, weights: LossWeights
    ) -> dict[str, Tensor]:
        """Return the unweighted losses against a feature teacher; the projector is called once for all tokens."""
        kind, cls, patches = self.config.teacher.loss, targets.features.global_features, targets.features.patch_features
        rows: dict[str, Tensor] = {}
        if weights.global_loss:
            rows["distil_cls"] = student.global_cls
            if student.local_cls is not None:
                rows["distil_local"] = student.local_cls
        if student.masked is not None:
            rows["distil_patch"] = student.masked
        if not rows:
            return {}
        assert self.projector is not None and cls is not None
        projected = self.projector(torch.cat(list(rows.values()))).split([len(row) for row in rows.values()])
        losses = {}
        for name, tokens in zip(rows, projected, strict=True):
            if name == "distil_local":
                losses[name] = local_view_loss(kind, tokens, cls, len(cls) // self.config.crops.global_count)
            else:
                target = cls if name == "distil_cls" else patches
                assert target is not None
                losses[name] = same_view_loss(kind, tokens, target)
        return losses

    def _global_loss(self, student: StudentFeatures, targets: Targets, local_weight: float) -> Tensor:
        crops = self.config.crops
        features = targets.features.global_features
        assert features is not None and targets.global_assignment is not None
        assert targets.teacher_prototypes.global_head is not None and self.global_head is not None
        rows = student.global_cls if student.local_cls is None else torch.cat([student.global_cls, student.local_cls])
        batch = student.global_cls.shape[0] // crops.global_count
        views = (crops.global_count, crops.local_count, batch, rows.device)
        loss = PrototypeTargets(
            features,
            targets.global_assignment,
            targets.teacher_prototypes.global_head,
            # if the local views have weight 0, only the rows of the global views are left
            view_pairs(*views)[: len(rows)],
            view_weights(*views, local_weight)[: len(rows)],
            self.config.objective.student_temperature,
            targets.teacher_temperature,
            self.config.objective.chunk_size(on_gpu=rows.is_cuda),
        )
        return self.global_head.prototypes(self.global_head(rows), loss)

    def _koleo(self, view: Tensor) -> Tensor:
        koleo = self.config.objective.koleo
        if koleo.distributed:
            timeout = self.config.engine.collective_timeout_seconds
            return distributed_koleo_loss(view, koleo.neighbours, koleo.group_size, timeout)
        return koleo_loss(view, koleo.neighbours)

    def _patch_loss(self, patches: Tensor, batch: Batch, targets: Targets) -> Tensor:
        """Return the masked-patch loss, averaged over all global crops, masked or not."""
        objective = self.config.objective
        features = targets.features.patch_features
        assert features is not None
        weight = batch.masks.weight
        if objective.patch_loss.reduction == "sum" and objective.patch_loss.kind != "ibot":
            weight = (weight > 0).to(weight.dtype)
        weight = weight / batch.global_crops.shape[0]
        if self.patch_head is None:
            patch_loss = l2_loss if objective.patch_loss.kind == "l2" else cosine_loss
            return patch_loss(patches, features, weight)
        assert targets.patch_assignment is not None and targets.teacher_prototypes.patch_head is not None
        loss = PrototypeTargets(
            features,
            targets.patch_assignment,
            targets.teacher_prototypes.patch_head,
            None,
            weight,
            objective.student_temperature,
            targets.teacher_temperature,
            objective.chunk_size(on_gpu=patches.is_cuda),
        )
        return self.patch_head.prototypes(self.patch_head(patches), loss)

    def _pixels(self, crops: Tensor) -> Tensor:
        return pixels(crops, self.config.crops, self.backbone)


class FrozenBackbone(nn.Module):
    """The frozen backbone of a Gram teacher or an anchor; its parameters have the names of ``SSLModel``'s backbone."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config.model)

    @torch.no_grad()
    def forward(self, crops: Tensor, grid: tuple[int, int]) -> Features:
        """Return the features of ``crops``, ``[N, height, width, channels]``.

        Patches of crops larger than the student's are resized bicubically to ``grid``, the student's patch grid.
        """
        images = pixels(crops, self.config.crops, self.backbone)
        (features,) = self.backbone([images], chunk=self.config.teacher.chunk)
        (group,) = self.backbone.layout([images]).groups
        return Features(features.cls, features.registers, resize_patches(features.patches, group.grid, grid))


def pixels(crops: Tensor, config: CropsConfig, backbone: VisionTransformer) -> Tensor:
    """Convert ``[N, height, width, channels]`` to normalised ``[N, channels, height, width]`` in its dtype."""
    return normalise(crops, config.mean, config.std, next(backbone.parameters()).dtype, config.value_range)
