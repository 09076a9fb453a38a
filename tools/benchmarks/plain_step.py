"""The same training step in plain PyTorch, as a baseline: one process, nothing sharded, fused or recomputed.

It uses the parameters of ``SSLModel`` but none of its forward code: one forward per crop size with fused attention,
whole logits and targets, bf16 autocast over fp32 weights, AdamW, a teacher EMA updated parameter by parameter, and
drop-path that multiplies dropped branches by 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamtrain.config.model import ModelConfig
from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch, normalise
from streamtrain.engine.optim import parameter_groups
from streamtrain.model.initialise import initialise
from streamtrain.objective.feature_losses import koleo_loss
from streamtrain.training.ssl_model import SSLModel


class PlainStep:
    """Student, teacher, optimiser, and one optimiser step on a batch."""

    def __init__(self, config: Config, device: torch.device, autocast: bool) -> None:
        """``autocast``: run matmuls in bf16."""
        self.config, self.device, self.autocast = config, device, autocast
        self.student, self.teacher = (SSLModel(config).to(device) for _ in range(2))
        for network in (self.student, self.teacher):
            initialise(network, config.model, config.run.seed)
        self.teacher.requires_grad_(False).eval()
        groups = parameter_groups(self.student.named_parameters(), config.model.depth, config.optim)
        self.optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, eps=config.optim.eps)

    def __call__(self, batch: Batch, lr: float, weight_decay: float, momentum: float, temperature: float) -> Tensor:
        """Run one optimiser step; return the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["rule"].lr_factor
            group["weight_decay"] = weight_decay if group["rule"].decays else 0.0
        loss = self.losses(batch, temperature)["total"]
        self.optimizer.zero_grad()
        loss.backward()
        if self.config.optim.clip:
            nn.utils.clip_grad_norm_(self.student.parameters(), self.config.optim.clip)
        self.optimizer.step()
        with torch.no_grad():
            for ema, parameter in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                ema.mul_(momentum).add_(parameter, alpha=1.0 - momentum)
        return loss.detach()

    def losses(self, batch: Batch, temperature: float) -> dict[str, Tensor]:
        """Return the losses ``total`` (weighted sum), ``global``, ``patch`` and ``koleo``."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self._losses(batch, *self._targets(batch, temperature))

    @torch.no_grad()
    def _targets(self, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
        iterations = self.config.objective.sinkhorn_iterations
        cls, patches = self._features(self.teacher, batch.global_crops)
        rows = patches.flatten(0, 1)[_masked_index(batch)]
        global_logits, patch_logits = _head(self.teacher.global_head, cls), _head(self.teacher.patch_head, rows)
        return sinkhorn(global_logits, temperature, iterations), sinkhorn(patch_logits, temperature, iterations)

    def _losses(self, batch: Batch, global_targets: Tensor, patch_targets: Tensor) -> dict[str, Tensor]:
        crops, objective = self.config.crops, self.config.objective
        cls, patches = self._features(self.student, batch.global_crops, batch.masks.grid_mask)
        rows = [cls, self._features(self.student, batch.local_crops)[0]] if crops.local_count else [cls]
        logits = _head(self.student.global_head, torch.cat(rows)).float()
        views = F.log_softmax(logits / objective.student_temperature, dim=-1).chunk(
            crops.global_count + crops.local_count
        )
        targets = global_targets.chunk(crops.global_count)
        pairs = [
            -(target * view).sum(dim=-1).mean()
            for i, target in enumerate(targets) for j, view in enumerate(views) if i != j
        ]  # fmt: skip
        patch_logits = _head(self.student.patch_head, patches.flatten(0, 1)[_masked_index(batch)]).float()
        log_probability = F.log_softmax(patch_logits / objective.student_temperature, dim=-1)
        row_weight = batch.masks.weight[batch.masks.weight > 0] / len(batch.global_crops)
        losses = {
            "global": torch.stack(pairs).mean(),
            "patch": -(row_weight * (patch_targets * log_probability).sum(dim=-1)).sum(),
            "koleo": torch.stack([koleo_loss(view) for view in cls.chunk(crops.global_count)]).sum(),
        }
        total = (
            objective.global_loss.weight.peak * losses["global"]
            + objective.patch_loss.weight.peak * losses["patch"]
            + objective.koleo.weight.peak * losses["koleo"]
        )
        return {"total": total, **losses}

    def _features(self, network: Any, crops: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pixels = normalise(crops, self.config.crops.mean, self.config.crops.std, torch.float32)
        return backbone_features(network.backbone, self.config.model, pixels, mask)


def backbone_features(backbone: Any, config: ModelConfig, images: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return normalised CLS tokens ``[images, dim]`` and patches ``[images, num_patches, dim]``."""
    height, width = (side // config.patch_size for side in images.shape[2:])
    cosine, sine = _rope_angles(config, height, width, images.device)
    embedding, drop_path = backbone.embedding, config.drop_path if backbone.training else 0.0
    tokens = _linear(embedding.projection, F.unfold(images, config.patch_size, stride=config.patch_size).mT)
    if mask is not None:
        tokens = torch.where(mask[..., None], embedding.mask_token.to(tokens.dtype), tokens)
    prefix = embedding.prefix().expand(len(images), -1, -1)
    tokens = torch.cat([prefix, tokens], dim=1)
    for block in backbone.blocks:
        branch = _attention(block.attention, config, _norm(block.norm1, config, tokens), cosine, sine)
        tokens = tokens + _drop(branch * block.scale1.gamma, drop_path)
        branch = _mlp(block.mlp, config, _norm(block.norm2, config, tokens))
        tokens = tokens + _drop(branch * block.scale2.gamma, drop_path)
    tokens = _norm(backbone.norm, config, tokens)
    return tokens[:, 0], tokens[:, 1 + config.num_registers :]


def sinkhorn(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """Return targets ``[rows, prototypes]`` (Caron et al. 2020)."""
    logits = logits.float()
    entries = torch.exp((logits - logits.max()) / temperature).t()
    prototypes, rows = entries.shape
    entries /= entries.sum()
    for _ in range(iterations):
        entries /= entries.sum(dim=1, keepdim=True)
        entries /= prototypes
        entries /= entries.sum(dim=0, keepdim=True)
        entries /= rows
    return (entries * rows).t()


def _attention(attention: Any, config: ModelConfig, tokens: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Self-attention; the last ``len(cosine)`` tokens of an image are patches, which RoPE rotates."""
    bias = attention.qkv.bias
    if bias is not None and len(bias) < len(attention.qkv.weight):
        # without a key bias, the parameter holds the biases of queries and values
        query_bias, value_bias = bias.chunk(2)
        bias = torch.cat([query_bias, torch.zeros_like(query_bias), value_bias])
    packed = F.linear(tokens, attention.qkv.weight, bias).unflatten(-1, (3, config.num_heads, -1))
    query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
    query, key = (_rotate(heads, cosine, sine).to(value.dtype) for heads in (query, key))
    return _linear(attention.proj, F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    prefix = heads.shape[2] - len(cosine)
    patches = heads[:, :, prefix:]
    first, second = patches.chunk(2, dim=-1)
    rotated = patches * cosine + torch.cat([-second, first], dim=-1) * sine
    return torch.cat([heads[:, :, :prefix], rotated.to(heads.dtype)], dim=2)


def _rope_angles(config: ModelConfig, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    head_dim = config.dim // config.num_heads
    axes = [2.0 * torch.arange(0.5, size, device=device) / size - 1.0 for size in (height, width)]
    coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    periods = config.rope_base ** torch.arange(0, 1, 4 / head_dim, device=device)
    angles = (2.0 * torch.pi * coordinates[:, :, None] / periods).flatten(1).repeat(1, 2)
    return angles.cos(), angles.sin()


def _mlp(mlp: Any, config: ModelConfig, tokens: Tensor) -> Tensor:
    if config.mlp == "swiglu":
        gate, up = _linear(mlp.gate_up, tokens).chunk(2, dim=-1)
        return _linear(mlp.down, F.silu(gate) * up)
    return _linear(mlp.down, F.gelu(_linear(mlp.up, tokens)))


def _head(head: Any, features: Tensor) -> Tensor:
    for index, layer in enumerate(head.projection.layers):
        features = _linear(layer, F.gelu(features) if index else features)
    return F.linear(F.normalize(features, dim=-1, eps=1e-6), head.prototypes.weight)


def _linear(layer: Any, inputs: Tensor) -> Tensor:
    return F.linear(inputs, layer.weight, layer.bias)


def _norm(norm: Any, config: ModelConfig, tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens, (config.dim,), norm.weight, norm.bias, config.norm_eps)


def _drop(branch: Tensor, rate: float) -> Tensor:
    """Drop-path: zero the branch of some images and rescale the others."""
    if not rate:
        return branch
    return branch * (branch.new_empty(len(branch), 1, 1).bernoulli_(1.0 - rate) / (1.0 - rate))


def _masked_index(batch: Batch) -> Tensor:
    return batch.masks.index[batch.masks.weight > 0]
