"""Dense features of images, and what can be seen in them: similarity to a patch, principal components."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from streamtrain.data.batch import normalise
from streamtrain.errors import StreamtrainError
from streamtrain.model.layers import Block
from streamtrain.model.layout import Layout
from streamtrain.model.vit import VisionTransformer
from streamtrain.ops.attention import RopeTable, add_key_bias, rotate

LEGIBLE_PATCHES = 24


def read_image(path: Path) -> Image.Image:
    """An image file, upright, in RGB.

    Raises:
        StreamtrainError: if it is missing or not an image.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise StreamtrainError(f"cannot read the image {path}: {error}") from None


def map_size(image_size: int, patch_size: int) -> int:
    """Shorter side in pixels at which maps show something: twice the training's, and at least 24 patches."""
    return max(2 * image_size, LEGIBLE_PATCHES * patch_size)


def fit_to_patches(image: Image.Image, size: int, patch_size: int) -> Image.Image:
    """Scale to a shorter side of about ``size`` pixels, both sides whole numbers of patches."""
    scale = size / min(image.size)
    width, height = (max(round(side * scale / patch_size), 1) * patch_size for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


@torch.inference_mode()
def patch_features(model: VisionTransformer, image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """L2-normalised features of each patch of an image whose sides are multiples of the patch: fp32 [h, w, D]."""
    parameter = next(model.parameters())
    pixels = torch.from_numpy(np.array(image)).unsqueeze(0).to(parameter.device)
    inputs = normalise(pixels, mean, std, parameter.dtype)
    patches = model.forward_features(inputs).patches[0].float()
    grid = (image.height // model.patch_size, image.width // model.patch_size)
    return F.normalize(patches, dim=-1).unflatten(0, grid).cpu()


@torch.inference_mode()
def cls_attention(
    model: VisionTransformer, image: Image.Image, mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
    """What the CLS token attends to among the patches in the last block: float32 [heads, h, w].

    Each head's map sums to the share of its attention that goes to patches; the rest goes to CLS and registers.
    """
    block = model.blocks[-1]
    assert isinstance(block, Block)
    qkv, num_heads = block.attention.qkv, block.attention.num_heads
    maps: list[Tensor] = []

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        tokens: Tensor = inputs[0]
        layout: Layout = inputs[1]
        tables: list[RopeTable] = inputs[2]
        packed = F.linear(block.norm1(tokens), qkv.weight, add_key_bias(qkv.bias, qkv.out_features))
        heads = layout.views(packed)[0].unflatten(-1, (3, num_heads, -1))
        turned = rotate(heads[:, :, :2], tables[0]).float()
        query, keys = turned[0, 0, 0], turned[0, :, 1]  # of CLS [heads, d], of all tokens [tokens, heads, d]
        scores = torch.einsum("hd,thd->ht", query, keys) * query.shape[-1] ** -0.5
        maps.append(scores.softmax(-1)[:, layout.num_prefix :])

    handle = block.register_forward_pre_hook(look)
    try:
        patch_features(model, image, mean, std)
    finally:
        handle.remove()
    grid = (image.height // model.patch_size, image.width // model.patch_size)
    return maps[0].unflatten(1, grid).cpu().numpy()


def similarity_maps(features: Sequence[Tensor], patch: tuple[int, int]) -> list[np.ndarray]:
    """Cosine similarity of one patch of the first image to every patch of every image.

    Args:
        features: normalised, [h_i, w_i, D] for each image.
        patch: (row, column) in the first image's grid.

    Returns:
        float32 [h_i, w_i] for each image, in -1..1.

    Raises:
        StreamtrainError: if the patch lies outside the grid.
    """
    height, width = features[0].shape[:2]
    row, column = patch
    if not (0 <= row < height and 0 <= column < width):
        raise StreamtrainError(
            f"patch {row},{column} lies outside the image's grid of {height} rows and {width} columns (from 0)"
        )
    query = features[0][row, column]
    return [(feature @ query).numpy() for feature in features]


def principal_components(features: Sequence[Tensor], count: int = 3) -> list[np.ndarray]:
    """The first ``count`` principal components of all images' patches together.

    Each is scaled so that the middle 96 % of all its values fill 0..1, and is turned so that its larger
    tail is bright: the same picture whatever sign the decomposition happened to take.

    Args:
        features: [h_i, w_i, D] for each image; at least ``count`` patches in all.

    Returns:
        float32 [h_i, w_i, count] in 0..1 for each image.
    """
    flat = torch.cat([feature.flatten(0, 1) for feature in features]).double()
    centred = flat - flat.mean(0)
    _, directions = torch.linalg.eigh(centred.T @ centred)
    projected = centred @ directions.flip(1)[:, :count]
    projected *= torch.where((projected**3).sum(0) < 0, -1.0, 1.0)
    low, high = torch.quantile(projected, torch.tensor([0.02, 0.98], dtype=torch.float64), dim=0)
    scaled = ((projected - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).float()
    pieces = scaled.split([feature.shape[0] * feature.shape[1] for feature in features])
    return [
        piece.unflatten(0, tuple(feature.shape[:2])).numpy() for piece, feature in zip(pieces, features, strict=True)
    ]


def foreground_components(features: Sequence[Tensor], count: int = 3) -> list[np.ndarray]:
    """``principal_components`` of the foreground's patches alone, the ground being black.

    The foreground is one side of the first component over all patches, parted where the variance between the sides is
    greatest (Otsu 1979): the side that holds less of the images' borders.

    Args:
        features: [h_i, w_i, D] for each image.

    Returns:
        float32 [h_i, w_i, count] in 0..1 for each image.
    """
    first = [component[..., 0] for component in principal_components(features, 1)]
    threshold = _otsu(np.concatenate([component.ravel() for component in first]))
    bright = [component > threshold for component in first]
    borders = np.concatenate([np.concatenate([mask[0], mask[-1], mask[1:-1, 0], mask[1:-1, -1]]) for mask in bright])
    if borders.mean() > np.concatenate([mask.ravel() for mask in bright]).mean():
        bright = [~mask for mask in bright]
    kept = [feature[torch.from_numpy(mask)] for feature, mask in zip(features, bright, strict=True)]
    if sum(map(len, kept)) < count:
        return principal_components(features, count)
    # as one image of a single row
    (colours,) = principal_components([torch.cat(kept)[None]], count)
    pieces = np.split(colours[0], np.cumsum([len(part) for part in kept])[:-1])
    maps = []
    for mask, piece in zip(bright, pieces, strict=True):
        painted = np.zeros((*mask.shape, count), np.float32)
        painted[mask] = piece
        maps.append(painted)
    return maps


def _otsu(values: np.ndarray) -> float:
    """The threshold in 0..1 that parts the values into two groups as far apart as can be."""
    counts, edges = np.histogram(values, bins=128, range=(0.0, 1.0))
    below = np.cumsum(counts)[:-1].astype(np.float64)
    sums = np.cumsum(counts * (edges[:-1] + edges[1:]) / 2)
    above = below[-1] + counts[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = sums[:-1] / below - (sums[-1] - sums[:-1]) / above
    between = np.nan_to_num(below * above * gap**2)
    # several thresholds may part them alike
    best = np.flatnonzero(between >= between.max() * (1 - 1e-12))
    return float(edges[1:-1][best].mean())
