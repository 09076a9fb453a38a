"""Convert backbone states between streamtrain and the published families: DINOv3's own, transformers, timm.

Families differ in names and in how tensors are split; every conversion is exact in both directions. A key bias is
converted too, because with RoPE it changes the attention scores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from streamtrain.errors import StreamtrainError

QKV_BIAS = "attention.qkv.bias"
KINDS = ("weight", "bias")


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
    ignored=r"rope_embed\.|blocks\.\d+\.attn\.qkv\.bias_mask",
)


def to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a backbone's state under the names of a saved ``DINOv3ViTModel``, which has no norm for local crops."""
    return _rename(state, HF)


def from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a backbone's state from the state of a ``DINOv3ViTModel``, saved or live."""
    return convert(state, HF)[0]


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a backbone's state under timm's names, without the mask token and the norm for local crops."""
    return _rename(state, TIMM)


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a backbone's state from the state of one of timm's DINOv3 models."""
    return convert(state, TIMM)[0]


def detect_naming(state: Iterable[str]) -> Naming | None:
    """Return the family whose names ``state`` has; None for streamtrain's own names.

    Raises:
        StreamtrainError: if the names belong to no known family.
    """
    names = list(state)
    marks = {".layer_scale1.lambda1": HF, ".gamma_1": TIMM, ".ls1.gamma": DINOV3, ".scale1.gamma": None}
    for mark, naming in marks.items():
        if any(name.endswith(mark) for name in names):
            return naming
    raise StreamtrainError(
        f"none of the {len(names)} tensors has a name of a vision transformer of streamtrain, transformers, timm or "
        "DINOv3"
    )


def convert(state: Mapping[str, Tensor], naming: Naming | None) -> tuple[dict[str, Tensor], list[str]]:
    """Return ``state`` under streamtrain's names, and the names without a counterpart.

    A prefix of all names, such as ``backbone.``, is removed.
    """
    sources, unexpected = match_names(state, naming)
    return {name: combine(name, [state[part] for part in parts], naming) for name, parts in sources.items()}, unexpected


def match_names(names: Iterable[str], naming: Naming | None) -> tuple[dict[str, list[str]], list[str]]:
    """Return the names that make up each streamtrain tensor, and the names without a counterpart."""
    names = list(names)
    anchor = "embedding.cls_token" if naming is None else naming.fixed["embedding.cls_token"]
    prefix = min((name for name in names if f".{name}".endswith(f".{anchor}")), key=len, default=anchor)
    prefix = prefix.removesuffix(anchor)
    inner = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    unexpected = [name for name in names if not name.startswith(prefix)]
    if naming is None:
        return {name: [source] for name, source in inner.items()}, unexpected
    # in memory, transformers has the blocks one level deeper than in saved files
    inner = {re.sub(rf"^model\.(?={re.escape(naming.block)}\d)", "", short): name for short, name in inner.items()}
    sources = {name: [inner.pop(part) for part in parts] for name, parts in list(_pairs(inner, naming))}
    unexpected += [name for short, name in inner.items() if not re.match(naming.ignored, short)]
    return sources, unexpected


def combine(name: str, parts: list[Tensor], naming: Naming | None) -> Tensor:
    """Return streamtrain's tensor ``name`` from the tensors of the family ``naming`` that make it up."""
    if naming is None:
        return parts[0]
    value = parts[0] if len(parts) == 1 else torch.cat(parts)
    if name.endswith(QKV_BIAS) and len(parts) == 1:
        # the family masks the key part of its fused bias
        query, _, rest = value.chunk(3)
        return torch.cat([query, rest])
    if name == "embedding.projection.weight":
        return value.flatten(1)
    if name in ("embedding.cls_token", "embedding.register_tokens", "embedding.mask_token"):
        return value.reshape(-1, value.shape[-1])
    return value


def _rename(state: Mapping[str, Tensor], naming: Naming) -> dict[str, Tensor]:
    """Return ``state`` under the family's names; tensors without a counterpart are left out."""
    dim = state["embedding.cls_token"].shape[-1]
    suffixes = naming.suffixes(swiglu="blocks.0.mlp.gate_up.weight" in state)
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in naming.fixed:
            # only transformers keeps the empty tensor of zero registers
            if value.numel() or naming is HF:
                result[naming.fixed[name]] = _reshape(name, value)
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


def _reshape(name: str, value: Tensor) -> Tensor:
    """Return a tensor outside the blocks in the shape that all families use."""
    if name.endswith("projection.weight"):
        side = isqrt(value.shape[1] // 3)
        return value.reshape(value.shape[0], 3, side, side)
    return value[None] if name.endswith(("_token", "_tokens")) else value


def _pairs(names: Mapping[str, str], naming: Naming) -> Iterator[tuple[str, list[str]]]:
    """Yield streamtrain's name and the family's names that make it up, for each tensor with all its parts."""
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
