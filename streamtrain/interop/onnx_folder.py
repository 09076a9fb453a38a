"""Write a backbone as an ONNX graph, for use without PyTorch."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamtrain.errors import StreamtrainError
from streamtrain.interop.folder import CONFIG_NAME, BackboneConfig
from streamtrain.interop.hf import PREPROCESSOR_NAME, preprocessor_config
from streamtrain.interop.model_card import CARD_NAME, onnx_card
from streamtrain.model.layers import Block, LayerNorm, SwiGlu
from streamtrain.model.rope import patch_centres, rope_factors
from streamtrain.model.vit import VisionTransformer
from streamtrain.ops.attention import add_key_bias

ONNX_NAME = "model.onnx"
# supported by onnxruntime 1.16 and newer
OPSET = 18
INPUT, OUTPUTS = "pixel_values", ("cls", "patches")


def export_onnx(model: VisionTransformer, config: BackboneConfig, out: Path) -> None:
    """Write ``out``/model.onnx with its weights, description and preprocessing as JSON, and a README with code.

    The graph maps ``pixel_values`` [batch, channels, height, width], fp32 and normalised, of any batch and any
    multiples of the patch size, to ``cls`` [batch, dim] and ``patches`` [batch, num_patches, dim], row by row.

    Raises:
        StreamtrainError: if ``onnxscript`` is not installed.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise StreamtrainError("export to onnx needs onnxscript: pip install 'streamtrain[onnx]'") from error
    patch = config.model.patch_size
    batch, rows, columns = (torch.export.Dim(name, min=1) for name in ("batch", "rows", "columns"))
    # the exporter treats example sizes of 1 as constants, and equal sizes as one dimension
    example = torch.zeros(2, config.model.channels, 3 * patch, 5 * patch)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Network(model, config).eval(), (example,), dynamo=True, opset_version=OPSET, input_names=[INPUT],
            output_names=[*OUTPUTS], dynamic_shapes=({0: batch, 2: patch * rows, 3: patch * columns},), verbose=False,
        )  # fmt: skip
        assert program is not None
        program.model.metadata_props["streamtrain"] = config.model_dump_json()
        program.save(out / ONNX_NAME, external_data=True)
    (out / CONFIG_NAME).write_text(config.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (out / PREPROCESSOR_NAME).write_text(json.dumps(preprocessor_config(config), indent=1) + "\n", encoding="utf-8")
    (out / CARD_NAME).write_text(onnx_card(config), encoding="utf-8")


class _Network(nn.Module):
    """The backbone in operations that ONNX has, on unpacked tokens."""

    def __init__(self, model: VisionTransformer, config: BackboneConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config.model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        model, patch = self.model, self.config.patch_size
        rows, columns = images.shape[2] // patch, images.shape[3] // patch
        pieces = images.unflatten(3, (columns, patch)).unflatten(2, (rows, patch)).permute(0, 2, 4, 1, 3, 5)
        embedding = model.embedding
        patches = embedding.projection(pieces.flatten(3).flatten(1, 2))
        tokens = torch.cat([embedding.prefix().expand(images.shape[0], -1, -1), patches], dim=1)
        head_dim = self.config.dim // self.config.num_heads
        centres = patch_centres((rows, columns), images.device)
        factors = rope_factors(centres, model.num_prefix, head_dim, self.config.rope_base)
        for block in model.blocks:
            assert isinstance(block, Block)
            tokens = tokens + self._attend(block, tokens, *factors)
            tokens = tokens + _refine(block, tokens)
        return _norm(model.norm_of_cls, tokens[:, 0]), _norm(model.norm, tokens[:, model.num_prefix :])

    def _attend(self, block: Block, tokens: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        qkv = block.attention.qkv
        packed = F.linear(_norm(block.norm1, tokens), qkv.weight, add_key_bias(qkv.bias, 3 * self.config.dim))
        # [3, batch, num_heads, length, head_dim]
        heads = packed.unflatten(2, (3, self.config.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = (_rotate(each, cosine, sine) for each in (heads[0], heads[1]))
        merged = F.scaled_dot_product_attention(query, key, heads[2]).transpose(1, 2).flatten(2)
        return block.attention.proj(merged) * block.scale1.gamma


def _refine(block: Block, tokens: Tensor) -> Tensor:
    mlp = block.mlp
    hidden = mlp.first(_norm(block.norm2, tokens))
    if isinstance(mlp, SwiGlu):
        gate, up = hidden.chunk(2, dim=-1)
        hidden = F.silu(gate) * up
    else:
        hidden = F.gelu(hidden)
    return mlp.down(hidden) * block.scale2.gamma


def _norm(norm: LayerNorm, tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat([second, first], dim=-1) * sine


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings, which concern only its own code."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
