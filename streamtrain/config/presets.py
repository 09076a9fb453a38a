"""Backbone sizes as plain data (Siméoni et al. 2025, table of architectures; S+ to 7B as published)."""

from __future__ import annotations

from typing import Any

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
