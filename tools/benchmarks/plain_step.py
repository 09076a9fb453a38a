"""A training step as it is usually written, to compare ours with: one process, plain PyTorch, nothing left out.

The same architecture, objective and parameter names as a ``SSLModel``: a forward for each crop size with fused
attention, whole logits and targets, bf16 autocast over fp32 weights, AdamW, an average kept parameter by parameter.
Drop-path multiplies by 0 what it drops.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamtrain.config.model import HeadConfig, ModelConfig
from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch, normalise
from streamtrain.engine.optim import parameter_groups
from streamtrain.model.initialise import initialise
from streamtrain.objective.feature_losses import koleo_loss


class PlainAttention(nn.Module):
    """Queries, keys and values from one linear layer; no key bias."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        if config.qkv_bias:
            self.qkv.bias = nn.Parameter(torch.empty((3 if config.key_bias else 2) * config.dim))
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, tokens: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """``[images, length, dim]`` to the same; the last ``len(cosine)`` tokens of an image are patches."""
        bias: Tensor | None = self.qkv.bias
        if bias is not None and len(bias) < self.qkv.out_features:
            bias = torch.cat([bias[: len(bias) // 2], torch.zeros_like(bias[: len(bias) // 2]), bias[len(bias) // 2 :]])
        packed = F.linear(tokens, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = (self._turn(heads, cosine, sine).to(value.dtype) for heads in (query, key))
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))

    @staticmethod
    def _turn(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        prefix = heads.shape[2] - len(cosine)
        patches = heads[:, :, prefix:]
        first, second = patches.chunk(2, dim=-1)
        turned = patches * cosine + torch.cat([-second, first], dim=-1) * sine
        return torch.cat([heads[:, :, :prefix], turned.to(heads.dtype)], dim=2)


class PlainMlp(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.mlp == "swiglu":
            self.gate_up = nn.Linear(config.dim, 2 * config.hidden)
        else:
            self.up = nn.Linear(config.dim, config.hidden)
        self.down = nn.Linear(config.hidden, config.dim)
        self.gated = config.mlp == "swiglu"

    def forward(self, tokens: Tensor) -> Tensor:
        if self.gated:
            gate, up = self.gate_up(tokens).chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)
        return self.down(F.gelu(self.up(tokens)))


class PlainScale(nn.Module):
    """LayerScale."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma


class PlainBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.drop_path = config.drop_path
        self.norm1 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attention = PlainAttention(config)
        self.scale1 = PlainScale(config.dim)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = PlainMlp(config)
        self.scale2 = PlainScale(config.dim)

    def forward(self, tokens: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        tokens = tokens + self._drop(self.scale1(self.attention(self.norm1(tokens), cosine, sine)))
        return tokens + self._drop(self.scale2(self.mlp(self.norm2(tokens))))

    def _drop(self, branch: Tensor) -> Tensor:
        if not self.training or not self.drop_path:
            return branch
        keep = 1.0 - self.drop_path
        return branch * (branch.new_empty(len(branch), 1, 1).bernoulli_(keep) / keep)


class PlainEmbedding(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.projection = nn.Linear(3 * config.patch_size**2, config.dim)
        self.cls_token = nn.Parameter(torch.empty(1, config.dim))
        self.register_tokens = nn.Parameter(torch.empty(config.num_registers, config.dim))
        self.mask_token = nn.Parameter(torch.empty(1, config.dim))

    def forward(self, images: Tensor, mask: Tensor | None) -> Tensor:
        patches = F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)
        tokens = self.projection(patches)
        if mask is not None:
            tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        prefix = torch.cat([self.cls_token, self.register_tokens]).expand(len(images), -1, -1)
        return torch.cat([prefix, tokens], dim=1)


class PlainBackbone(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = PlainEmbedding(config)
        self.blocks = nn.ModuleList([PlainBlock(config) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalised CLS tokens ``[images, dim]`` and patches ``[images, num_patches, dim]``."""
        cosine, sine = self._angles(*(side // self.config.patch_size for side in images.shape[2:]))
        tokens = self.embedding(images, mask)
        for block in self.blocks:
            tokens = block(tokens, cosine, sine)
        tokens = self.norm(tokens)
        return tokens[:, 0], tokens[:, 1 + self.config.num_registers :]

    def _angles(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        head_dim, device = self.config.dim // self.config.num_heads, self.norm.weight.device
        axes = [2.0 * torch.arange(0.5, size, device=device) / size - 1.0 for size in (height, width)]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
        periods = self.config.rope_base ** torch.arange(0, 1, 4 / head_dim, device=device)
        angles = (2.0 * torch.pi * places[:, :, None] / periods).flatten(1).repeat(1, 2)
        return angles.cos(), angles.sin()


class PlainProjection(nn.Module):
    def __init__(self, dim: int, config: HeadConfig) -> None:
        super().__init__()
        sizes = [dim, *[config.hidden] * (config.layers - 1), config.bottleneck]
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(sizes)])

    def forward(self, features: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            features = layer(F.gelu(features) if index else features)
        return F.normalize(features, dim=-1, eps=1e-6)


class PlainHead(nn.Module):
    """Rows to logits."""

    def __init__(self, dim: int, config: HeadConfig) -> None:
        super().__init__()
        self.projection = PlainProjection(dim, config)
        self.prototypes = nn.Linear(config.bottleneck, config.prototypes, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.prototypes(self.projection(features))


class PlainNetwork(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.backbone = PlainBackbone(config.model)
        self.global_head = PlainHead(config.model.dim, config.objective.global_loss.head)
        self.patch_head = PlainHead(config.model.dim, config.objective.patch_loss.head)


def sinkhorn(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """Targets ``[rows, prototypes]`` (Caron et al. 2020)."""
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


class PlainStep:
    """Student, teacher, optimiser and what they do to a batch."""

    def __init__(self, config: Config, device: torch.device, autocast: bool) -> None:
        """``autocast``: bf16 products."""
        self.config, self.device, self.autocast = config, device, autocast
        self.student, self.teacher = (PlainNetwork(config).to(device) for _ in range(2))
        for network in (self.student, self.teacher):
            initialise(network, config.model, config.run.seed)
        self.teacher.requires_grad_(False).eval()
        groups = parameter_groups(self.student.named_parameters(), config.model.depth, config.optim)
        self.optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, eps=config.optim.eps)

    def losses(self, batch: Batch, temperature: float) -> dict[str, Tensor]:
        """The weighted ``total``, with the parts: ``global``, ``patch``, ``koleo``."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            targets = self._targets(batch, temperature)
            return self._losses(batch, *targets)

    def __call__(self, batch: Batch, lr: float, weight_decay: float, momentum: float, temperature: float) -> Tensor:
        """One optimiser step; returns the loss."""
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
            for average, newest in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                average.mul_(momentum).add_(newest, alpha=1.0 - momentum)
        return loss.detach()

    def _pixels(self, crops: Tensor) -> Tensor:
        return normalise(crops, self.config.crops.mean, self.config.crops.std, torch.float32)

    @torch.no_grad()
    def _targets(self, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
        objective = self.config.objective
        cls, patches = self.teacher.backbone(self._pixels(batch.global_crops))
        rows = patches.flatten(0, 1)[self._masked(batch)]
        of_global = sinkhorn(self.teacher.global_head(cls), temperature, objective.sinkhorn_iterations)
        return of_global, sinkhorn(self.teacher.patch_head(rows), temperature, objective.sinkhorn_iterations)

    def _losses(self, batch: Batch, of_global: Tensor, of_patch: Tensor) -> dict[str, Tensor]:
        crops, objective = self.config.crops, self.config.objective
        cls, patches = self.student.backbone(self._pixels(batch.global_crops), batch.masks.grid_mask)
        student_rows = [cls]
        if crops.local_count:
            student_rows.append(self.student.backbone(self._pixels(batch.local_crops))[0])
        logits = self.student.global_head(torch.cat(student_rows))
        views = F.log_softmax(logits.float() / objective.student_temperature, dim=-1).chunk(
            crops.global_count + crops.local_count
        )
        targets = of_global.chunk(crops.global_count)
        pairs = [
            -(target * view).sum(dim=-1).mean()
            for i, target in enumerate(targets) for j, view in enumerate(views) if i != j
        ]  # fmt: skip
        masked = patches.flatten(0, 1)[self._masked(batch)]
        log_probability = F.log_softmax(
            self.student.patch_head(masked).float() / objective.student_temperature, dim=-1
        )
        row_weight = batch.masks.weight[batch.masks.weight > 0] / len(batch.global_crops)
        losses = {
            "global": torch.stack(pairs).mean(),
            "patch": -(row_weight * (of_patch * log_probability).sum(dim=-1)).sum(),
            "koleo": torch.stack([koleo_loss(view) for view in cls.chunk(crops.global_count)]).sum(),
        }
        total = (
            objective.global_loss.weight.peak * losses["global"]
            + objective.patch_loss.weight.peak * losses["patch"]
            + objective.koleo.weight.peak * losses["koleo"]
        )
        return {"total": total, **losses}

    @staticmethod
    def _masked(batch: Batch) -> Tensor:
        return batch.masks.index[batch.masks.weight > 0]

