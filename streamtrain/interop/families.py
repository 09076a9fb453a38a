"""How the published families of the same vision transformer name its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

KINDS = ("weight", "bias")


@dataclass(frozen=True)
class Naming:
    """One family's names. In a block, several of theirs are rows of one of ours, in that order."""

    name: str
    # ours to theirs, outside the blocks; tensors they do not have are missing here
    fixed: Mapping[str, str]
    # the start of a block's names
    block: str
    common: Mapping[str, Sequence[str]]
    gelu: Mapping[str, Sequence[str]]
    swiglu: Mapping[str, Sequence[str]]
    # query, key and value bias; one name: all three in one tensor, the key part 0
    bias: Sequence[str]
    # what is no parameter, or follows from the others
    ignored: str

    def suffixes(self, swiglu: bool) -> dict[str, Sequence[str]]:
        """Ours to theirs within a block, all but the qkv bias."""
        return {**self.common, **(self.swiglu if swiglu else self.gelu)}


def _with_bias(names: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """Weight and bias of each linear or norm layer."""
    return {f"{ours}.{kind}": [f"{one}.{kind}" for one in theirs] for ours, theirs in names.items() for kind in KINDS}


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
