"""The ``model`` section: the backbone and the projection heads."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import model_validator

from streamtrain.config.section import Channels, NonNegative, Positive, Section, accept, fixed, free
from streamtrain.config.user_code import UserCode

# backbone sizes (Siméoni et al. 2025, table of architectures)
PRESETS: dict[str, dict[str, Any]] = {
    "vits16": {"dim": 384, "depth": 12, "num_heads": 6},
    "vits16plus": {"dim": 384, "depth": 12, "num_heads": 6, "mlp": "swiglu", "mlp_hidden": 1536},
    "vitb16": {"dim": 768, "depth": 12, "num_heads": 12},
    "vitl16": {"dim": 1024, "depth": 24, "num_heads": 16},
    "vitl16plus": {"dim": 1024, "depth": 24, "num_heads": 16, "mlp": "swiglu", "mlp_hidden": 4096},
    "vith16plus": {"dim": 1280, "depth": 32, "num_heads": 20, "mlp": "swiglu", "mlp_hidden": 5120},
    "vitg16": {"dim": 1536, "depth": 40, "num_heads": 24},
    "vit7b16": {
        "dim": 4096,
        "depth": 40,
        "num_heads": 32,
        "mlp": "swiglu",
        "mlp_hidden": 8192,
        "qkv_bias": False,
        "untied_norms": "local_cls",
    },
}


# last parts of the names of an adapter's parameters: A [rank, inputs] and B [outputs, rank]
ADAPTERS = ("lora_a", "lora_b")
Target = Literal["qkv", "proj", "mlp"]


def is_adapter(name: str) -> bool:
    """Return whether a parameter belongs to a LoRA adapter."""
    return name.rpartition(".")[2] in ADAPTERS


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021) of a frozen backbone, for continuing from released weights.

    An adapted linear layer adds ``alpha / rank * B A x``. Outside the free blocks, all other parameters of the
    backbone, including norms and LayerScale, keep the values of ``init.weights``. Student, teacher and anchor share
    them. Heads are trained in full.
    """

    rank: NonNegative = fixed(0, "Rank of the adapters; 0: no adapters, the whole backbone trains.")
    alpha: float = fixed(16.0, "The adapters' output is multiplied by alpha / rank.", gt=0.0)
    targets: tuple[Target, ...] = fixed(
        ("qkv", "proj", "mlp"), "Linear layers with adapters: qkv and proj of the attention, both layers of the mlp."
    )
    blocks: Literal["all"] | Positive = fixed(
        "all", "Blocks with adapters: all, or N for the last N blocks before the free blocks."
    )
    free_blocks: NonNegative = fixed(
        0, "Number of last blocks that train whole, without adapters (ExPLoRA, Khanna et al. 2024)."
    )

    @model_validator(mode="after")
    def _check_targets(self) -> LoraConfig:
        if not self.rank:
            for name, field in type(self).model_fields.items():
                if getattr(self, name) != field.default:
                    raise ValueError(f"{name} has an effect only with rank above 0")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets {list(self.targets)} must name one or more layers, each once")
        return self

    @property
    def scale(self) -> float:
        """Factor of the adapters' output."""
        return self.alpha / self.rank


class ModelConfig(Section):
    """The backbone. Keys given beside ``preset`` replace the preset's values."""

    preset: str | None = free(
        None, f"Backbone size that fills in the keys below: {', '.join(PRESETS)}; null: no preset."
    )
    channels: Channels = fixed(3, "Channels of the images. Follows data.channels, so it need not be set.")
    patch_size: Positive = fixed(16, "Side of a patch in pixels.")
    dim: Positive = fixed(384, "Width of the tokens, a multiple of num_heads; each head has a multiple of 4 features.")
    depth: Positive = fixed(12, "Number of transformer blocks.", le=10_000)
    num_heads: Positive = fixed(6, "Attention heads per block.")
    mlp: Literal["gelu", "swiglu"] = fixed("gelu", "Activation of the MLP: GELU, or SwiGLU with a gate.")
    mlp_hidden: Positive | None = fixed(None, "Hidden width of the MLP; null: 4 x dim.")
    num_registers: NonNegative = fixed(4, "Number of register tokens.")
    layerscale: float = accept(1e-5, "Initial value of LayerScale.", gt=0.0)
    drop_path: float = accept(
        0.3, "Share of samples that skip a residual branch in training, the same in every block.", ge=0.0, lt=1.0
    )
    qkv_bias: bool = fixed(True, "Add a bias to queries, keys and values.")
    key_bias: bool = fixed(False, "Include the keys in the query-key-value bias.")
    norm_eps: float = accept(1e-5, "Epsilon of LayerNorm.", gt=0.0)
    rope_base: float = accept(100.0, "Base of the RoPE periods.", gt=1.0)
    rope_rescale: float | None = accept(
        None, "Training only: scale the coordinates of both axes by one log-uniform factor in [1/x, x]; null: off.",
        gt=1.0,
    )  # fmt: skip
    rope_jitter: float | None = accept(
        None, "Training only: scale the coordinates of each axis by a log-uniform factor in [1/x, x]; null: off.",
        gt=1.0,
    )  # fmt: skip
    rope_shift: float | None = accept(
        None, "Training only: shift the coordinates of each axis by a uniform value in [-x, x]; null: off.", gt=0.0
    )
    untied_norms: Literal["none", "cls", "local_cls", "cls_and_local_cls"] = fixed(
        "none", "Separate final LayerNorm for CLS and registers: of all crops (cls) or of local crops in training "
        "(local_cls).",
    )  # fmt: skip
    factory: UserCode | None = fixed(
        None, "Class of your own that builds the backbone, a subclass of VisionTransformer (docs/training.md); null: "
        "the built-in one.",
    )  # fmt: skip
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or raw.get("preset") is None:
            return raw
        if not isinstance(raw["preset"], str) or raw["preset"] not in PRESETS:
            raise ValueError(f"unknown preset {raw['preset']!r}; choose one of {', '.join(PRESETS)}")
        return {**PRESETS[raw["preset"]], **raw}

    @model_validator(mode="after")
    def _check_heads_and_bias(self) -> ModelConfig:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")
        if (self.dim // self.num_heads) % 4:
            raise ValueError(f"dim / num_heads is {self.dim // self.num_heads}; axial RoPE needs a multiple of 4")
        if self.key_bias and not self.qkv_bias:
            raise ValueError("key_bias needs qkv_bias")
        return self

    @model_validator(mode="after")
    def _check_lora(self) -> ModelConfig:
        lora = self.lora
        if not lora.rank:
            return self
        if self.factory is not None:
            raise ValueError("lora needs the built-in network; leave out factory")
        if lora.rank > min(self.dim, self.hidden):
            raise ValueError(
                f"lora.rank {lora.rank} is larger than the narrowest adapted layer, {min(self.dim, self.hidden)}; "
                "lower it"
            )
        if lora.free_blocks >= self.depth:
            raise ValueError(
                f"lora.free_blocks {lora.free_blocks} leaves no block with adapters: depth is {self.depth}; lower it"
            )
        if lora.blocks != "all" and lora.blocks + lora.free_blocks > self.depth:
            raise ValueError(
                f"lora.blocks {lora.blocks} and lora.free_blocks {lora.free_blocks} are together more than depth "
                f"{self.depth}; lower one of them"
            )
        return self

    @property
    def adapted_blocks(self) -> range:
        """Indices of the blocks with adapters."""
        if not self.lora.rank:
            return range(0)
        end = self.depth - self.lora.free_blocks
        return range(0 if self.lora.blocks == "all" else end - self.lora.blocks, end)

    @property
    def trained_blocks(self) -> range:
        """Indices of the blocks in which any parameter trains; blocks below them need no backward."""
        return range(self.adapted_blocks.start, self.depth)

    def is_trained(self, name: str) -> bool:
        """Return whether the backbone's parameter ``name`` trains; the others keep their initial values."""
        if not self.lora.rank or is_adapter(name):
            return True
        block = re.match(r"blocks\.(\d+)\.", name)
        return block is not None and int(block[1]) >= self.adapted_blocks.stop

    @property
    def cls_norm(self) -> bool:
        """Whether CLS and registers have a final norm of their own."""
        return self.untied_norms in ("cls", "cls_and_local_cls")

    @property
    def local_norm(self) -> bool:
        """Whether CLS and registers of local crops have a final norm of their own in training."""
        return self.untied_norms in ("local_cls", "cls_and_local_cls")

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP, with the default filled in."""
        return self.mlp_hidden or 4 * self.dim


class HeadConfig(Section):
    """A projection head: an MLP to a normalized bottleneck, then prototypes without bias."""

    prototypes: Positive = fixed(65_536, "Number of prototypes.")
    hidden: Positive = fixed(2048, "Hidden width of the MLP.")
    bottleneck: Positive = fixed(256, "Width of the bottleneck.")
    layers: Positive = fixed(3, "Linear layers of the MLP.")
