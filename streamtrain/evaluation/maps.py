"""Maps of dense features: cosine similarity to a patch, principal components, attention of the CLS token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shards.format.pixels import Range
from streamtrain.data.batch import UNIT_RANGE, normalise
from streamtrain.data.still_images import Still, resize_still, still_size
from streamtrain.errors import StreamtrainError
from streamtrain.model.layers import Block
from streamtrain.model.vit import VisionTransformer
from streamtrain.ops.attention import rotate

LEGIBLE_PATCHES = 24
MAX_ASPECT = 8
# of an input; memory grows with their number, time with its square
MAX_PIXELS = 2**25


def map_size(image_size: int, patch_size: int) -> int:
    """Return a legible input size, the shorter side in pixels: twice the training size, at least 24 patches."""
    return max(2 * image_size, LEGIBLE_PATCHES * patch_size)


def fit_to_patches(image: Still, size: int, patch_size: int) -> Still:
    """Resize to a shorter side of about ``size`` pixels, with both sides multiples of the patch size.

    A side longer than ``MAX_ASPECT`` times the other is compressed, since memory and time grow with the pixels.

    Raises:
        StreamtrainError: the image would have more than ``MAX_PIXELS`` pixels.
    """
    scale = size / min(still_size(image))
    sides = (min(side * scale, MAX_ASPECT * size) for side in still_size(image))
    width, height = (max(round(side / patch_size), 1) * patch_size for side in sides)
    if width * height > MAX_PIXELS:
        raise StreamtrainError(f"--size {size} makes an input of {width}x{height} pixels; choose a smaller --size")
    return resize_still(image, (width, height))


@torch.inference_mode()
def patch_features(
    model: VisionTransformer,
    image: Still,
    mean: Sequence[float],
    std: Sequence[float],
    value_range: Sequence[Range] = UNIT_RANGE,
) -> Tensor:
    """Return L2-normalised patch features fp32 [h, w, D], on the CPU.

    Args:
        model: in eval mode.
        image: both sides multiples of the patch size.
        mean, std, value_range: per channel, as in training.
    """
    patches = model.forward_features(_to_input(model, image, mean, std, value_range)).patches[0].float()
    width, height = still_size(image)
    grid = (height // model.patch_size, width // model.patch_size)
    return F.normalize(patches, dim=-1).unflatten(0, grid).cpu()


@torch.inference_mode()
def cls_attention(
    model: VisionTransformer,
    image: Still,
    mean: Sequence[float],
    std: Sequence[float],
    value_range: Sequence[Range] = UNIT_RANGE,
) -> np.ndarray:
    """Return the CLS token's attention to the patches in the last block: float32 [heads, h, w].

    Each head's map sums to less than 1; the rest of its attention goes to CLS and registers.
    """
    inputs = _to_input(model, image, mean, std, value_range)
    layout, tokens = model.layout([inputs]), model.embedding([inputs], [None])
    (group,) = layout.groups
    table = model.rope.table(group.grid, tokens.device, tokens.dtype, None)
    *blocks, last = model.blocks
    for block in blocks:
        tokens = block(tokens, layout, [table])
    assert isinstance(last, Block)
    # Computed from the block's input and weights: fused kernels never form the attention weights.
    norm, weight, bias, dim = last.norm1, last.attention.qkv.weight, last.attention.qkv.bias, tokens.shape[-1]
    normed = F.layer_norm(tokens, (dim,), norm.weight, norm.bias, norm.eps)
    query = F.linear(normed, weight[:dim], None if bias is None else bias[:dim])
    has_key_bias = bias is not None and len(bias) == 3 * dim
    key = F.linear(normed, weight[dim : 2 * dim], bias[dim : 2 * dim] if has_key_bias else None)
    pairs = torch.stack([query, key], 1).unflatten(-1, (-1, model.rope.head_dim))
    rotated = rotate(pairs[None], table)[0].float()
    query, key = rotated[0, 0], rotated[:, 1]  # of CLS [heads, d], of all tokens [tokens, heads, d]
    scores = torch.einsum("hd,thd->ht", query, key) * model.rope.head_dim**-0.5
    return scores.softmax(-1)[:, layout.num_prefix :].unflatten(1, group.grid).cpu().numpy()


def _to_input(
    model: VisionTransformer, image: Still, mean: Sequence[float], std: Sequence[float], value_range: Sequence[Range]
) -> Tensor:
    """Return the normalised image [1, channels, height, width] on the model's device, in its precision."""
    parameter = next(model.parameters())
    pixels = torch.from_numpy(np.array(image)).unsqueeze(0).to(parameter.device)
    return normalise(pixels, mean, std, parameter.dtype, value_range)


def similarity_maps(features: Sequence[Tensor], patch: tuple[int, int]) -> list[np.ndarray]:
    """Return the cosine similarity of one patch of the first image to every patch of every image.

    Args:
        features: normalised, [h_i, w_i, D] for each image.
        patch: (row, column) in the first image's grid.

    Returns:
        float32 [h_i, w_i] for each image, in -1..1.

    Raises:
        StreamtrainError: if the patch is outside the grid.
    """
    height, width = features[0].shape[:2]
    row, column = patch
    if not (0 <= row < height and 0 <= column < width):
        raise StreamtrainError(
            f"patch {row},{column} is outside the image's grid of {height} rows and {width} columns (from 0)"
        )
    query = features[0][row, column]
    return [(feature @ query).numpy() for feature in features]


def principal_components(features: Sequence[Tensor], count: int = 3) -> list[np.ndarray]:
    """Return the first ``count`` principal components of the patches of all images together.

    The middle 96 % of each component's values are scaled to 0..1. Its sign is chosen such that the longer tail is
    bright, so that the picture does not depend on the sign of the eigenvector.

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


def foreground_components(features: Sequence[Tensor]) -> list[np.ndarray]:
    """Return the first three principal components of the foreground patches; background patches are black.

    Args:
        features: [h_i, w_i, D] for each image.

    Returns:
        float32 [h_i, w_i, 3] in 0..1 for each image.
    """
    bright = foreground_masks(features)
    kept = [feature[torch.from_numpy(mask)] for feature, mask in zip(features, bright, strict=True)]
    if sum(map(len, kept)) < 3:
        return principal_components(features)
    # all foreground patches as one image with a single row
    (colours,) = principal_components([torch.cat(kept)[None]])
    pieces = np.split(colours[0], np.cumsum([len(part) for part in kept])[:-1])
    maps = []
    for mask, piece in zip(bright, pieces, strict=True):
        painted = np.zeros((*mask.shape, 3), np.float32)
        painted[mask] = piece
        maps.append(painted)
    return maps


def foreground_masks(features: Sequence[Tensor]) -> list[np.ndarray]:
    """Return which patches are foreground: bool [h_i, w_i] for each image.

    The first component over all patches is split at the threshold with the largest variance between the two sides
    (Otsu 1979). The foreground is the side with the smaller share of the images' borders.

    Args:
        features: [h_i, w_i, D] for each image.
    """
    first = [component[..., 0] for component in principal_components(features, 1)]
    threshold = _otsu(np.concatenate([component.ravel() for component in first]))
    bright = [component > threshold for component in first]
    borders = np.concatenate([np.concatenate([mask[0], mask[-1], mask[1:-1, 0], mask[1:-1, -1]]) for mask in bright])
    if borders.mean() > np.concatenate([mask.ravel() for mask in bright]).mean():
        bright = [~mask for mask in bright]
    return bright


def _otsu(values: np.ndarray) -> float:
    """Return the threshold in 0..1 that splits the values with the largest variance between the two groups."""
    counts, edges = np.histogram(values, bins=128, range=(0.0, 1.0))
    below = np.cumsum(counts)[:-1].astype(np.float64)
    sums = np.cumsum(counts * (edges[:-1] + edges[1:]) / 2)
    above = below[-1] + counts[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = sums[:-1] / below - (sums[-1] - sums[:-1]) / above
    between = np.nan_to_num(below * above * gap**2)
    # several thresholds may split the values equally well
    best = np.flatnonzero(between >= between.max() * (1 - 1e-12))
    return float(edges[1:-1][best].mean())
