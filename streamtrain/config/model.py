"""The backbone: a preset's fields, or explicit ones, or both (explicit fields win)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from streamtrain.config.presets import PRESETS
from streamtrain.config.section import NonNegative, Positive, Section


class ModelConfig(Section):
    """``model``: all of it affects results.

    ``preset`` names a row of ``streamtrain.config.presets``; any field given beside it replaces the preset's.
    """

    preset: str | None = None
    patch_size: Positive = 16
    dim: Positive = 384
    depth: Positive = 12
    num_heads: Positive = 6
    mlp: Literal["gelu", "swiglu"] = "gelu"
    # hidden width of the MLP; null: four times dim
    mlp_hidden: Positive | None = None
    num_registers: NonNegative = 4
    # initial value of LayerScale
    layerscale: float = Field(default=1e-5, gt=0.0)
    # share of samples that skip a residual branch, the same in every block
    drop_path: float = Field(default=0.3, ge=0.0, lt=1.0)
    qkv_bias: bool = True
    # whether the key part of the query-key-value bias exists
    key_bias: bool = False
    norm_eps: float = Field(default=1e-5, gt=0.0)
    rope_base: float = Field(default=100.0, gt=1.0)
    # training-time coordinate augmentation: log-uniform in [1/x, x] for both axes, for each axis, and a shift
    rope_rescale: float | None = Field(default=None, gt=1.0)
    rope_jitter: float | None = Field(default=None, gt=1.0)
    rope_shift: float | None = Field(default=None, gt=0.0)
    # final norms of their own: for CLS and registers (cls), for those of the local crops in training (local_cls)
    untied_norms: Literal["none", "cls", "local_cls", "cls_and_local_cls"] = "none"

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or raw.get("preset") is None:
            return raw
        if not isinstance(raw["preset"], str) or raw["preset"] not in PRESETS:
            raise ValueError(f"unknown preset {raw['preset']!r}; there are {', '.join(PRESETS)}")
        return {**PRESETS[raw["preset"]], **raw}

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")
        if (self.dim // self.num_heads) % 4:
            raise ValueError(
                f"a head of dim / num_heads = {self.dim // self.num_heads} features cannot hold an axial "
                "RoPE; it must be a multiple of 4"
            )
        if self.key_bias and not self.qkv_bias:
            raise ValueError("key_bias needs qkv_bias")
        return self

    @property
    def cls_norm(self) -> bool:
        """Whether CLS and registers have another final norm than the patches."""
        return self.untied_norms in ("cls", "cls_and_local_cls")

    @property
    def local_norm(self) -> bool:
        """Whether CLS and registers of local crops have one of their own in training."""
        return self.untied_norms in ("local_cls", "cls_and_local_cls")

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP."""
        return self.mlp_hidden or 4 * self.dim


class HeadConfig(Section):
    """A projection head: ``layers`` linears to a normalised bottleneck, then prototypes without bias."""

    prototypes: Positive = 65_536
    hidden: Positive = 2048
    bottleneck: Positive = 256
    layers: Positive = 3


