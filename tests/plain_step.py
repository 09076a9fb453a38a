"""A plain implementation of a step as a reference: loops over views, whole logits, the precision of its inputs."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch
from streamtrain.training.ssl_model import SSLModel


class PlainBackbone(nn.Module):
    """The backbone for one crop size: a convolution, [N, T, D] tokens, softmax attention."""

    def __init__(self, model: SSLModel) -> None:
        super().__init__()
        self.net = model.backbone
        self.config = model.config.model

    def forward(self, pixels: Tensor, mask: Tensor | None, local: bool = False) -> tuple[Tensor, Tensor]:
        embedding, dim = self.net.embedding, self.config.dim
        kernel = embedding.projection.weight.reshape(dim, 3, self.config.patch_size, self.config.patch_size)
        grid = F.conv2d(pixels, kernel, embedding.projection.bias, stride=self.config.patch_size)
        height, width = grid.shape[-2:]
        tokens = grid.flatten(2).transpose(1, 2)
        if mask is not None:
            tokens = torch.where(mask[..., None], embedding.mask_token, tokens)
        prefix = embedding.prefix().expand(len(pixels), -1, -1)
        tokens = torch.cat([prefix, tokens], dim=1)
        for block in self.net.blocks:
            tokens = tokens + block.scale1.gamma * self._attention(block, block.norm1(tokens), height, width)
            hidden = F.gelu(block.mlp.up(block.norm2(tokens)))
            tokens = tokens + block.scale2.gamma * block.mlp.down(hidden)
        patches = self.net.norm(tokens[:, 1 + self.config.num_registers :])
        cls_norm = (local and self.net.local_norm) or self.net.cls_norm or self.net.norm
        return cls_norm(tokens[:, 0]), patches

    def _attention(self, block: Any, tokens: Tensor, height: int, width: int) -> Tensor:
        dim, heads = self.config.dim, self.config.num_heads
        query_bias, value_bias = block.attention.qkv.bias.chunk(2)
        query, key, value = (
            (tokens @ weight.T + bias).unflatten(-1, (heads, -1)).transpose(1, 2)
            for weight, bias in zip(
                block.attention.qkv.weight.split(dim), (query_bias, 0.0 * query_bias, value_bias), strict=True
            )
        )
        query, key = (self._rotate(x, height, width) for x in (query, key))
        scores = query @ key.transpose(2, 3) / math.sqrt(dim // heads)
        return block.attention.proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))

    def _rotate(self, x: Tensor, height: int, width: int) -> Tensor:
        """Rotate the pairs (i, i + half) of each patch by 2π · coordinate / period, rows first, then columns."""
        prefix, half = 1 + self.config.num_registers, x.shape[-1] // 2
        result = [x[:, :, :prefix]]
        for patch, (row, column) in enumerate(product(range(height), range(width))):
            y, x_ = 2 * (row + 0.5) / height - 1, 2 * (column + 0.5) / width - 1
            angles = []
            for coordinate in (y, x_):
                angles += [2 * math.pi * coordinate / 100.0 ** (2 * i / half) for i in range(half // 2)]
            turns = torch.tensor(angles, dtype=x.dtype)
            cosine, sine = turns.cos(), turns.sin()
            one, two = x[:, :, prefix + patch].split(half, dim=-1)
            result.append(torch.cat([one * cosine - two * sine, two * cosine + one * sine], dim=-1)[:, :, None])
        return torch.cat(result, dim=2)


def project(head: Any, features: Tensor) -> Tensor:
    for index, layer in enumerate(head.projection.layers):
        features = features if index == 0 else F.gelu(features)
        features = features @ layer.weight.T + layer.bias
    return features / features.norm(dim=-1, keepdim=True)


def plain_sinkhorn(logits: Tensor, iterations: int = 3) -> Tensor:
    """Return assignments for logits / temperature, in logarithms, since even float64 overflows at exp(710)."""
    log_q = logits
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(0, keepdim=True) - math.log(log_q.shape[1])
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    return log_q.exp()


def plain_softmax(logits: Tensor) -> Tensor:
    # at the first step, whose centre is its own mean
    return (logits - logits.mean(0)).softmax(1)


def pixels_of(crops: Tensor, config: Config) -> Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (config.crops.mean, config.crops.std))
    return ((crops.double() / 255 - mean) / std).permute(0, 3, 1, 2)


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    return -(target * logits.log_softmax(-1)).sum(-1)


def plain_gram(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """Return the Gram loss of the patches ``[B, num_patches, dim]`` of each view."""
    units = ((x / x.norm(dim=-1, keepdim=True) for x in pair) for pair in zip(ours, theirs, strict=True))
    return torch.stack([(a @ a.transpose(1, 2) - b @ b.transpose(1, 2)).square().mean() for a, b in units]).mean()


def plain_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the mean of 1 − cosine similarity over the last dimension."""
    return (1 - (ours * theirs).sum(-1) / ours.norm(dim=-1) / theirs.norm(dim=-1)).mean()


def plain_anchor(config: Config, ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the anchor loss of CLS features and patches of each view."""
    cls, patches = ([torch.cat([view[part] for view in views]) for views in (ours, theirs)] for part in (0, 1))
    compare = {"gram": lambda ours, theirs: plain_gram([ours], [theirs]), "cosine": plain_distance}
    return plain_distance(*cls) + compare[config.objective.anchor.patches](*patches)


def plain_koleo(cls: Tensor) -> Tensor:
    """Return KoLeo of one view's ``[B, dim]``; 0 for a single sample, infinite for duplicates."""
    unit = cls / cls.norm(dim=1, keepdim=True)
    others = [[j for j in range(len(unit)) if j != i] for i in range(len(unit))]
    nearest = [min((unit[i] - unit[j]).norm() for j in other) for i, other in enumerate(others) if other]
    return -torch.stack(nearest).log().mean() if nearest else 0.0 * cls.sum()


def plain_losses(
    config: Config, student: SSLModel, teacher: SSLModel, batches: list[Batch], teacher_temperature: float
) -> list[dict[str, Tensor]]:
    """Return the losses of every micro-batch of one step, with a forward per view; for networks in float64."""
    V, L = config.crops.global_count, config.crops.local_count
    B = len(batches[0].slots)
    student_temperature = config.objective.student_temperature
    assign = plain_sinkhorn if config.objective.centering == "sinkhorn" else plain_softmax

    def logits_of(head: Any, features: Tensor, temperature: float) -> Tensor:
        return project(head, features) @ head.prototypes.weight.T / temperature

    kind, reduction = config.objective.patch_loss.kind, config.objective.patch_loss.reduction
    views = [
        [pixels_of(crops, config).unflatten(0, (count, B)) for crops, count in zip(pair, (V, L), strict=True)]
        for pair in ((batch.global_crops, batch.local_crops) for batch in batches)
    ]
    masks = [batch.masks.grid_mask.unflatten(0, (V, B)) for batch in batches]
    with torch.no_grad():
        teacher_outputs = [[PlainBackbone(teacher)(view, None) for view in of_global] for of_global, _ in views]
        cls_logits = torch.stack(
            [
                torch.stack([logits_of(teacher.global_head, cls, teacher_temperature) for cls, _ in s])
                for s in teacher_outputs
            ]
        )
        cls_targets = assign(cls_logits.flatten(0, 2)).unflatten(0, cls_logits.shape[:3])
        patches = [
            patch[mask]
            for s, m in zip(teacher_outputs, masks, strict=True)
            for (_, patch), mask in zip(s, m, strict=True)
        ]
        if kind == "ibot":
            logits = logits_of(teacher.patch_head, torch.cat(patches), teacher_temperature)
            patches = list(assign(logits).split([len(piece) for piece in patches]))
    patch_targets = [patches[i : i + V] for i in range(0, len(patches), V)]

    results = []
    for (of_global, of_local), of_teacher, mask, cls_target, patch_target in zip(
        views, teacher_outputs, masks, cls_targets, patch_targets, strict=True
    ):
        backbone = PlainBackbone(student)
        outputs = [backbone(view, m) for view, m in zip(of_global, mask, strict=True)]
        outputs += [backbone(view, None, local=True) for view in of_local]
        pairs = [
            cross_entropy(cls_target[t], logits_of(student.global_head, cls, student_temperature))
            for s, (cls, _) in enumerate(outputs)
            for t in range(V)
            if s != t
        ]
        assert len(pairs) == V * (V - 1) + V * L
        per_crop = [torch.zeros((), dtype=torch.float64)]
        for v, b in product(range(V), range(B)):
            expected = patch_target[v].split(mask[v].sum(1).tolist())[b]
            given = outputs[v][1][b][mask[v][b]]
            if not len(given):
                continue
            if kind == "ibot":
                losses = cross_entropy(expected, logits_of(student.patch_head, given, student_temperature))
            elif kind == "l2":
                losses = (given - expected).square().sum(1)
            else:
                losses = 1 - (given * expected).sum(1) / given.norm(dim=1) / expected.norm(dim=1)
            per_crop.append(losses.sum() if reduction == "sum" and kind != "ibot" else losses.mean())
        results.append(
            {
                "global": torch.stack(pairs).mean(),
                "patch": torch.stack(per_crop).sum() / (V * B),
                "koleo": torch.stack([plain_koleo(cls) for cls, _ in outputs[:V]]).sum(),
                "gram": plain_gram([patch for _, patch in outputs[:V]], [patch for _, patch in of_teacher]),
                # the teacher is the starting network too
                "anchor": plain_anchor(config, outputs[:V], of_teacher),
            }
        )
    return results
