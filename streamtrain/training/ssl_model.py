"""Student and teacher as one kind of module: backbone, heads and losses (Siméoni et al. 2025, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shards.randomness import MODEL, derive_seed
from streamtrain.config.crops import CropsConfig
from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch, normalise
from streamtrain.model.heads import ProjectionHead
from streamtrain.model.vit import Features, VisionTransformer
from streamtrain.objective.feature_losses import cosine_loss, distributed_koleo_loss, koleo_loss, l2_loss
from streamtrain.objective.gram import resize_patches
from streamtrain.objective.prototypes import PrototypeTargets
from streamtrain.objective.targets import Targets, TeacherFeatures, view_pairs, view_weights


@dataclass(frozen=True)
class LossWeights:
    """Factors of the loss terms at a step; a term of weight 0 is not computed at all."""

    global_loss: float = 1.0
    patch_loss: float = 1.0
    koleo: float = 0.1
    # of the local views within the global loss
    local_loss: float = 1.0
    gram: float = 0.0


@dataclass(frozen=True)
class StudentFeatures:
    """Normalised backbone features of a micro-batch; None where no term wants them."""

    # [V * B, dim] and [L * B, dim]
    global_cls: Tensor
    local_cls: Tensor | None
    # at the masks' index, [M, dim]
    masked: Tensor | None
    # of all global crops, [V * B, num_patches, dim]
    patches: Tensor | None


RECIPE_WEIGHTS = LossWeights()


class Learner(nn.Module):
    """Backbone and heads. Student and teacher are of the same class, so that their shards agree."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        objective = config.objective
        engine = config.engine
        self.backbone = VisionTransformer(
            config.model, engine.checkpointing, engine.view_groups, engine.offload_checkpoints
        )
        self.global_head = ProjectionHead(config.model.dim, objective.global_loss.head)
        self.patch_head = (
            ProjectionHead(config.model.dim, objective.patch_loss.head) if objective.patch_loss.kind == "ibot" else None
        )

    def forward(
        self, batch: Batch | Tensor, targets: Targets | None = None, weights: LossWeights = RECIPE_WEIGHTS
    ) -> TeacherFeatures | dict[str, Tensor] | Features:
        """The losses of one micro-batch; without ``targets``, the teacher's features of it.

        Of plain images, uint8 ``[N, height, width, 3]``, it returns the backbone's normalised features, for evaluation.

        Returns:
            As student, fp32 scalars: ``total`` (weighted, differentiable) and, detached and unweighted, one
            of ``global``, ``patch``, ``koleo``, ``gram`` for each term whose weight is not 0.
        """
        if isinstance(batch, Tensor):
            # compiled is only what a step meets; an evaluation's images may each have a size of their own
            with torch.compiler.set_stance("force_eager"):
                return self.backbone.forward_features(self._pixels(batch), self.config.teacher.chunk)
        return self._teach(batch, weights) if targets is None else self._learn(batch, weights, targets)

    @torch.no_grad()
    def _teach(self, batch: Batch, weights: LossWeights) -> TeacherFeatures:
        """Unmasked global crops through backbone and heads; masked positions only where patches matter."""
        if not weights.global_loss and not weights.patch_loss:
            return TeacherFeatures(None, None, batch.masks.weight)
        crops = [self._pixels(batch.global_crops)]
        layout = self.backbone.layout(crops)
        rows = {"global": layout.cls_rows(0, crops[0].device)}
        if weights.patch_loss:
            rows["masked"] = layout.patch_rows(0, batch.masks.index)
        found = self._encoded(crops, [None], rows, chunk=self.config.teacher.chunk)
        of_global = self.global_head(found["global"]) if weights.global_loss else None
        of_patch = found.get("masked")
        if of_patch is not None and self.patch_head is not None:
            of_patch = self.patch_head(of_patch)
        return TeacherFeatures(of_global, of_patch, batch.masks.weight, found["global"])

    def _learn(self, batch: Batch, weights: LossWeights, targets: Targets) -> dict[str, Tensor]:
        features = self._student_features(batch, weights)
        factors = {
            "global": weights.global_loss,
            "patch": weights.patch_loss,
            "koleo": weights.koleo,
            "gram": weights.gram,
        }
        assert any(factors.values()), "all loss terms have weight 0"
        losses = {}
        if weights.global_loss:
            losses["global"] = self._global_loss(features, targets, weights.local_loss)
        if features.masked is not None:
            losses["patch"] = self._patch_loss(features.masked, batch, targets)
        if weights.koleo:
            views = features.global_cls.chunk(self.config.crops.global_count)
            losses["koleo"] = torch.stack([self._koleo(view) for view in views]).sum()
        if features.patches is not None:
            assert targets.gram is not None, "the Gram loss has a weight but no targets"
            losses["gram"] = targets.gram(features.patches, batch.masks.grid_mask)
        total = torch.stack([factors[name] * loss for name, loss in losses.items()]).sum()
        return {"total": total, **{name: loss.detach() for name, loss in losses.items()}}

    def _student_features(self, batch: Batch, weights: LossWeights) -> StudentFeatures:
        """All crops in one pass, the global ones masked; only the rows that some term wants are normalised."""
        crops, masks = [self._pixels(batch.global_crops)], [batch.masks.grid_mask]
        with_local = bool(self.config.crops.local_count and weights.global_loss and weights.local_loss)
        if with_local:
            crops.append(self._pixels(batch.local_crops))
        device = crops[0].device
        seed = derive_seed(self.config.run.seed, MODEL, int(batch.slots[0]))
        generator = torch.Generator(device).manual_seed(seed)
        layout = self.backbone.layout(crops)
        rows = {"global": layout.cls_rows(0, device)}
        if weights.gram:
            every = torch.arange(batch.masks.grid_mask.numel(), device=device)
            rows["patches"] = layout.patch_rows(0, every)
        elif weights.patch_loss:
            rows["masked"] = layout.patch_rows(0, batch.masks.index)
        if with_local:
            rows["local"] = layout.cls_rows(1, device)
        found = self._encoded(crops, [*masks, *[None] * (len(crops) - 1)], rows, generator)
        if weights.gram and weights.patch_loss:
            found["masked"] = found["patches"].index_select(0, batch.masks.index)
        patches = found["patches"].unflatten(0, batch.masks.grid_mask.shape) if weights.gram else None
        return StudentFeatures(found["global"], found.get("local"), found.get("masked"), patches)

    def _encoded(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        rows: dict[str, Tensor],
        generator: torch.Generator | None = None,
        chunk: int = 0,
    ) -> dict[str, Tensor]:
        """Normalised features of the tokens somebody wants, each of the final norms called once."""
        tokens, _ = self.backbone.encode(crops, masks, generator, chunk, rows=torch.cat(list(rows.values())))
        pieces = dict(zip(rows, tokens.split([len(row) for row in rows.values()]), strict=True))
        norms = {"global": self.backbone.norm_of_cls, "local": self.backbone.norm_of_local_cls}
        found: dict[str, Tensor] = {}
        for norm in dict.fromkeys(norms.get(name, self.backbone.norm) for name in rows):
            mine = {name: piece for name, piece in pieces.items() if norms.get(name, self.backbone.norm) is norm}
            normalised = norm(tokens if len(mine) == len(pieces) else torch.cat(list(mine.values())))
            found |= dict(zip(mine, normalised.split([len(piece) for piece in mine.values()]), strict=True))
        return found

    def _global_loss(self, student: StudentFeatures, targets: Targets, local_weight: float) -> Tensor:
        crops = self.config.crops
        features = targets.features.global_features
        assert features is not None and targets.global_assignment is not None
        assert targets.teacher_prototypes.global_head is not None
        rows = student.global_cls if student.local_cls is None else torch.cat([student.global_cls, student.local_cls])
        batch = student.global_cls.shape[0] // crops.global_count
        views = (crops.global_count, crops.local_count, batch, rows.device)
        loss = PrototypeTargets(
            features,
            targets.global_assignment,
            targets.teacher_prototypes.global_head,
            # without local rows (their weight is 0) the rows of the global views remain
            view_pairs(*views)[: len(rows)],
            view_weights(*views, local_weight)[: len(rows)],
            self.config.objective.student_temperature,
            targets.teacher_temperature,
            self.config.objective.chunk_bytes,
        )
        return self.global_head.prototypes(self.global_head(rows), loss)

    def _koleo(self, view: Tensor) -> Tensor:
        koleo = self.config.objective.koleo
        if koleo.distributed:
            return distributed_koleo_loss(view, koleo.neighbours, koleo.group_size)
        return koleo_loss(view, koleo.neighbours)

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
        assert targets.patch_assignment is not None and targets.teacher_prototypes.patch_head is not None
        loss = PrototypeTargets(
            features,
            targets.patch_assignment,
            targets.teacher_prototypes.patch_head,
            None,
            weight,
            objective.student_temperature,
            targets.teacher_temperature,
            objective.chunk_bytes,
        )
        return self.patch_head.prototypes(self.patch_head(patches), loss)

    def _pixels(self, crops: Tensor) -> Tensor:
        return pixels(crops, self.config.crops, self.backbone)


class GramTeacher(nn.Module):
    """The frozen backbone whose patch similarities the student keeps; its names are those of a ``Learner``'s."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = VisionTransformer(config.model)

    @torch.no_grad()
    def forward(self, crops: Tensor, grid: tuple[int, int]) -> Tensor:
        """uint8 ``[N, height, width, 3]`` to patches ``[N, num_patches, dim]`` on ``grid``, that of the global crops.

        The crops may be larger than the student's; their features are then resized bicubically.
        """
        images = pixels(crops, self.config.crops, self.backbone)
        patches = self.backbone([images], chunk=self.config.teacher.chunk)[0].patches
        (group,) = self.backbone.layout([images]).groups
        return resize_patches(patches, group.grid, grid)


def pixels(crops: Tensor, config: CropsConfig, backbone: VisionTransformer) -> Tensor:
    """uint8 ``[N, height, width, 3]`` to normalised ``[N, 3, height, width]`` of the backbone's type."""
    return normalise(crops, config.mean, config.std, backbone.embedding.cls_token.dtype)
