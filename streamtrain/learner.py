"""Student and teacher as one kind of module: backbone, heads and losses (Siméoni et al. 2025, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shards.randomness import MODEL, derive_seed
from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch, normalise
from streamtrain.model.heads import ProjectionHead
from streamtrain.model.vit import VisionTransformer
from streamtrain.objective.koleo import koleo_loss
from streamtrain.objective.patches import cosine_loss, l2_loss
from streamtrain.objective.prototypes import PrototypeTargets
from streamtrain.objective.targets import Targets, TeacherFeatures, view_pairs, view_weights


@dataclass(frozen=True)
class LossWeights:
    """Factors of the loss terms at a step; a term of weight 0 is not computed at all."""

    global_loss: float = 1.0
    patch_loss: float = 1.0
    koleo: float = 0.1


RECIPE_WEIGHTS = LossWeights()


class Learner(nn.Module):
    """Backbone and heads. Student and teacher are of the same class, so that their shards agree."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        objective = config.objective
        self.backbone = VisionTransformer(config.model, config.engine.checkpointing)
        self.global_head = ProjectionHead(config.model.dim, objective.global_loss.head)
        self.patch_head = (
            ProjectionHead(config.model.dim, objective.patch_loss.head) if objective.patch_loss.kind == "ibot" else None
        )

    def forward(
        self, batch: Batch, targets: Targets | None = None, weights: LossWeights = RECIPE_WEIGHTS
    ) -> TeacherFeatures | dict[str, Tensor]:
        """The losses of one micro-batch; without ``targets``, the teacher's features of it.

        Returns:
            As student, fp32 scalars: ``total`` (weighted, differentiable) and, detached and unweighted, one
            of ``global``, ``patch``, ``koleo`` for each term whose weight is not 0.
        """
        return self._teach(batch, weights) if targets is None else self._learn(batch, weights, targets)

    @torch.no_grad()
    def _teach(self, batch: Batch, weights: LossWeights) -> TeacherFeatures:
        """Unmasked global crops through backbone and heads; masked positions only where patches matter."""
        if not weights.global_loss and not weights.patch_loss:
            return TeacherFeatures(None, None, batch.masks.weight)
        crops = [self._pixels(batch.global_crops)]
        tokens, _ = self.backbone.encode(crops, [None], chunk=self.config.teacher.chunk)
        layout = self.backbone.layout(crops)
        rows = []
        if weights.global_loss:
            rows.append(layout.cls_rows(0, tokens.device))
        if weights.patch_loss:
            rows.append(layout.patch_rows(0, batch.masks.index))
        # the norm is per token: only the rows that somebody wants are normalised
        wanted = self.backbone.norm(tokens.index_select(0, torch.cat(rows))).split([len(row) for row in rows])
        pieces = iter(wanted)
        of_global = self.global_head(next(pieces)) if weights.global_loss else None
        of_patch = next(pieces) if weights.patch_loss else None
        if of_patch is not None and self.patch_head is not None:
            of_patch = self.patch_head(of_patch)
        return TeacherFeatures(of_global, of_patch, batch.masks.weight)

    def _learn(self, batch: Batch, weights: LossWeights, targets: Targets) -> dict[str, Tensor]:
        global_cls, local_cls, patches = self._student_features(batch, weights)
        assert weights.global_loss or weights.patch_loss or weights.koleo, "all loss terms have weight 0"
        losses = {}
        if weights.global_loss:
            losses["global"] = self._global_loss(global_cls, local_cls, targets)
        if weights.patch_loss:
            assert patches is not None
            losses["patch"] = self._patch_loss(patches, batch, targets)
        if weights.koleo:
            views = global_cls.chunk(self.config.crops.global_count)
            losses["koleo"] = torch.stack([koleo_loss(view) for view in views]).sum()
        factors = {"global": weights.global_loss, "patch": weights.patch_loss, "koleo": weights.koleo}
        total = torch.stack([factors[name] * loss for name, loss in losses.items()]).sum()
        return {"total": total, **{name: loss.detach() for name, loss in losses.items()}}

    def _student_features(self, batch: Batch, weights: LossWeights) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Normalised CLS of the (masked) global and of the local crops, and patches at masked positions."""
        crops, masks = [self._pixels(batch.global_crops)], [batch.masks.grid_mask]
        with_local = self.config.crops.local_count > 0 and weights.global_loss > 0
        if with_local:
            crops.append(self._pixels(batch.local_crops))
        device = crops[0].device
        seed = derive_seed(self.config.run.seed, MODEL, int(batch.slots[0]))
        generator = torch.Generator(device).manual_seed(seed)
        tokens, _ = self.backbone.encode(crops, [*masks, *[None] * (len(crops) - 1)], generator)
        layout = self.backbone.layout(crops)
        rows = [layout.cls_rows(0, device)]
        rows += [layout.patch_rows(0, batch.masks.index)] if weights.patch_loss else []
        local_rows = [layout.cls_rows(1, device)] if with_local else []
        untied = self.backbone.local_norm
        if untied is None:
            rows += local_rows
        pieces = list(self.backbone.norm(tokens.index_select(0, torch.cat(rows))).split([len(row) for row in rows]))
        if untied is not None and with_local:
            pieces.append(untied(tokens.index_select(0, local_rows[0])))
        global_cls = pieces.pop(0)
        patches = pieces.pop(0) if weights.patch_loss else None
        return global_cls, pieces[0] if with_local else None, patches

    def _global_loss(self, global_cls: Tensor, local_cls: Tensor | None, targets: Targets) -> Tensor:
        crops = self.config.crops
        features = targets.features.global_features
        assert features is not None and targets.global_assignment is not None
        assert targets.handles.global_head is not None
        batch = global_cls.shape[0] // crops.global_count
        rows = global_cls if local_cls is None else torch.cat([global_cls, local_cls])
        num_local = 0 if local_cls is None else crops.local_count
        loss = PrototypeTargets(
            features,
            targets.global_assignment,
            targets.handles.global_head,
            view_pairs(crops.global_count, num_local, batch, rows.device),
            view_weights(crops.global_count, num_local, batch, rows.device),
            self.config.objective.student_temperature,
            targets.teacher_temperature,
            self.config.objective.chunk_bytes,
        )
        return self.global_head.prototypes(self.global_head(rows), loss)

    def _patch_loss(self, patches: Tensor, batch: Batch, targets: Targets) -> Tensor:
        """Averaged over all global crops, masked or not."""
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
        assert targets.patch_assignment is not None and targets.handles.patch_head is not None
        loss = PrototypeTargets(
            features,
            targets.patch_assignment,
            targets.handles.patch_head,
            torch.arange(patches.shape[0], device=patches.device)[:, None],
            weight,
            objective.student_temperature,
            targets.teacher_temperature,
            objective.chunk_bytes,
        )
        return self.patch_head.prototypes(self.patch_head(patches), loss)

    def _pixels(self, crops: Tensor) -> Tensor:
        """uint8 ``[N, height, width, 3]`` to normalised ``[N, 3, height, width]`` of the model's type."""
        config = self.config.crops
        return normalise(crops, config.mean, config.std, self.backbone.embedding.cls_token.dtype)
