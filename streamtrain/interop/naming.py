"""Convert backbone states between streamtrain and the published families: DINOv3's own, transformers, timm.

Families differ in names and in how tensors are split; every conversion is exact in both directions. A key bias is
converted too, because with RoPE it changes the attention scores.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

QKV_BIAS = "attention.qkv.bias"
KINDS = ("weight", "bias")
# beside a fused bias of DINOv3
BIAS_MASK = "attn.qkv.bias_mask"


@dataclass(frozen=True)
class Naming:
    """Parameter names of one model family.

    Mappings go from streamtrain's name to the family's. Within a block, a streamtrain tensor can be the concatenation
    of several of the family's along the rows.

    Attributes:
        fixed: names outside the blocks; tensors that the family lacks are left out.
        block: prefix of the block names, before the index.
        common: names within every block.
        gelu, swiglu: names within a block with that MLP.
        bias: of query, key and value; a single name is a fused bias whose key part counts as 0.
        ignored: pattern of names that are not parameters.
    """

    name: str
    fixed: Mapping[str, str]
    block: str
    common: Mapping[str, Sequence[str]]
    gelu: Mapping[str, Sequence[str]]
    swiglu: Mapping[str, Sequence[str]]
    bias: Sequence[str]
    ignored: str

    def suffixes(self, swiglu: bool) -> dict[str, Sequence[str]]:
        """Return the names within a block, except the qkv bias."""
        return {**self.common, **(self.swiglu if swiglu else self.gelu)}


def _with_bias(names: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    return {f"{name}.{kind}": [f"{part}.{kind}" for part in parts] for name, parts in names.items() for kind in KINDS}


HF = Naming(
    name="transformers",
    fixed={
        "embedding.cls_token": "embeddings.cls_token",
        "embedding.register_tokens": "embeddings.register_tokens",
        "embedding.mask_token": "embeddings.mask_token",
        "embedding.projection.weight": "embeddings.patch_embeddings.weight",
        "embedding.projection.bias": "embeddings.patch_embeddings.bias",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
    },
    block="layer.",
    common={
        **_with_bias({"norm1": ["norm1"], "norm2": ["norm2"], "attention.proj": ["attention.o_proj"]}),
        **_with_bias({"mlp.down": ["mlp.down_proj"]}),
        "attention.qkv.weight": [f"attention.{part}_proj.weight" for part in "qkv"],
        "scale1.gamma": ["layer_scale1.lambda1"],
        "scale2.gamma": ["layer_scale2.lambda1"],
    },
    gelu=_with_bias({"mlp.up": ["mlp.up_proj"]}),
    swiglu=_with_bias({"mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"]}),
    bias=[f"attention.{part}_proj.bias" for part in "qkv"],
    ignored=r"rope_embeddings\.",
)

TIMM = Naming(
    name="timm",
    fixed={
        "embedding.cls_token": "cls_token",
        "embedding.register_tokens": "reg_token",
        "embedding.projection.weight": "patch_embed.proj.weight",
        "embedding.projection.bias": "patch_embed.proj.bias",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
    },
    block="blocks.",
    common={
        **_with_bias({"norm1": ["norm1"], "norm2": ["norm2"], "attention.proj": ["attn.proj"]}),
        **_with_bias({"mlp.down": ["mlp.fc2"]}),
        "attention.qkv.weight": ["attn.qkv.weight"],
        "scale1.gamma": ["gamma_1"],
        "scale2.gamma": ["gamma_2"],
    },
    gelu=_with_bias({"mlp.up": ["mlp.fc1"]}),
    swiglu=_with_bias({"mlp.gate_up": ["mlp.fc1_g", "mlp.fc1_x"]}),
    bias=["attn.q_bias", "attn.k_bias", "attn.v_bias"],
    ignored=r"rope\.",
)

DINOV3 = Naming(
    name="DINOv3",
    fixed={
        "embedding.cls_token": "cls_token",
        "embedding.register_tokens": "storage_tokens",
        "embedding.mask_token": "mask_token",
        "embedding.projection.weight": "patch_embed.proj.weight",
        "embedding.projection.bias": "patch_embed.proj.bias",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
        "cls_norm.weight": "cls_norm.weight",
        "cls_norm.bias": "cls_norm.bias",
        "local_norm.weight": "local_cls_norm.weight",
        "local_norm.bias": "local_cls_norm.bias",
    },
    block="blocks.",
    common={
        **_with_bias({"norm1": ["norm1"], "norm2": ["norm2"], "attention.proj": ["attn.proj"]}),
        "attention.qkv.weight": ["attn.qkv.weight"],
        "scale1.gamma": ["ls1.gamma"],
        "scale2.gamma": ["ls2.gamma"],
    },
    gelu=_with_bias({"mlp.up": ["mlp.fc1"], "mlp.down": ["mlp.fc2"]}),
    swiglu=_with_bias({"mlp.gate_up": ["mlp.w1", "mlp.w2"], "mlp.down": ["mlp.w3"]}),
    bias=["attn.qkv.bias"],
    ignored=rf"rope_embed\.|blocks\.\d+\.{re.escape(BIAS_MASK)}",
)

_OWN_TOKENS = ("embedding.cls_token", "embedding.register_tokens", "embedding.mask_token")
_OWN_LAYERS = ("embedding.projection", "norm", "cls_norm", "local_norm")
OWN = Naming(
    name="streamtrain",
    fixed={name: name for name in (*_OWN_TOKENS, *(f"{layer}.{kind}" for layer in _OWN_LAYERS for kind in KINDS))},
    block="blocks.",
    common={
        **_with_bias({part: [part] for part in ("norm1", "norm2", "attention.proj", "mlp.down")}),
        **{name: [name] for name in ("attention.qkv.weight", "scale1.gamma", "scale2.gamma")},
    },
    gelu=_with_bias({"mlp.up": ["mlp.up"]}),
    swiglu=_with_bias({"mlp.gate_up": ["mlp.gate_up"]}),
    bias=[QKV_BIAS],
    ignored=r"$.",
)
NAMINGS = (HF, TIMM, DINOV3, OWN)


def to_hf(state: Mapping[str, Tensor], channels: int = 3) -> dict[str, Tensor]:
    """Return a backbone's state under the names of a saved ``DINOv3ViTModel``, which has no norm for local crops."""
    # only transformers has a tensor of zero registers
    none = {"embedding.register_tokens": state["embedding.cls_token"][:0]}
    return _rename(none | dict(state), HF, channels)


def to_timm(state: Mapping[str, Tensor], channels: int = 3) -> dict[str, Tensor]:
    """Return a backbone's state under timm's names, without the mask token and the norm for local crops."""
    return _rename(state, TIMM, channels)


def combine(name: str, parts: list[Tensor], naming: Naming, has_key_bias: bool = False) -> Tensor:
    """Return streamtrain's tensor ``name`` from the tensors of the family ``naming`` that make it up.

    Args:
        has_key_bias: keep the key part of a fused bias, which the family otherwise masks.
    """
    value = parts[0] if len(parts) == 1 else torch.cat(parts)
    if naming is OWN:
        return value
    if name.endswith(QKV_BIAS) and len(parts) == 1 and not has_key_bias:
        query, _, rest = value.chunk(3)
        return torch.cat([query, rest])
    if name == "embedding.projection.weight":
        return value.flatten(1)
    if name in ("embedding.cls_token", "embedding.register_tokens", "embedding.mask_token"):
        return value.reshape(-1, value.shape[-1])
    return value


def _rename(state: Mapping[str, Tensor], naming: Naming, channels: int) -> dict[str, Tensor]:
    """Return ``state`` under the family's names; tensors without a counterpart are left out."""
    dim = state["embedding.cls_token"].shape[-1]
    suffixes = naming.suffixes(swiglu="blocks.0.mlp.gate_up.weight" in state)
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in naming.fixed:
            result[naming.fixed[name]] = _reshape(name, value, channels)
        elif block := re.match(r"blocks\.(\d+)\.(.+)", name):
            start, suffix = f"{naming.block}{block[1]}.", block[2]
            if suffix == QKV_BIAS:
                parts = (value[:dim], value[dim:-dim], value[-dim:])
                result |= {start + bias: part for bias, part in zip(naming.bias, parts, strict=True) if len(part)}
            else:
                names = suffixes[suffix]
                for part_name, part in zip(names, value.chunk(len(names)), strict=True):
                    result[start + part_name] = part
    return result


def _reshape(name: str, value: Tensor, channels: int) -> Tensor:
    """Return a tensor outside the blocks in the shape that all families use."""
    if name.endswith("projection.weight"):
        side = isqrt(value.shape[1] // channels)
        return value.reshape(value.shape[0], channels, side, side)
    return value[None] if name.endswith(("_token", "_tokens")) else value


def match_names(names: Collection[str], naming: Naming) -> Iterator[tuple[str, list[str]]]:
    """Yield each streamtrain name whose parts are all in ``names``, and these parts."""
    for name, theirs in naming.fixed.items():
        if theirs in names:
            yield name, [theirs]
    indices = sorted({int(m[1]) for m in (re.match(rf"{re.escape(naming.block)}(\d+)\.", n) for n in names) if m})
    for index in indices:
        start = f"{naming.block}{index}."
        gate = start + naming.swiglu["mlp.gate_up.weight"][0]
        for name, parts in naming.suffixes(swiglu=gate in names).items():
            if all(start + part in names for part in parts):
                yield f"blocks.{index}.{name}", [start + part for part in parts]
        biases = [start + part for part in naming.bias if start + part in names]
        if biases:
            yield f"blocks.{index}.{QKV_BIAS}", biases
