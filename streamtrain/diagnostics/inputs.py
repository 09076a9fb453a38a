"""Statistics of the network's inputs, which reveal wrong images or a wrong normalisation.

data/pixel_mean        mean of the normalised pixels of global crops: near 0 if ``crops.mean`` fits the images
data/pixel_std         their standard deviation: near 1 if ``crops.std`` fits
data/pixel_structure   correlation of pixels an eighth of the crop's width apart, as the root mean square over the
                       crops: near 0 in noise, above 0.2 in photographs
data/view_correlation  intraclass correlation of the amount of detail in a crop: near 0 if two views of an image differ
                       as much as two images, because all images are equal
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamtrain.config.crops import CropsConfig
from streamtrain.data.batch import normalise

MEAN, STD, STRUCTURE, VIEWS = (
    "data/pixel_mean", "data/pixel_std", "data/pixel_structure", "data/view_correlation",
)  # fmt: skip
# bounds of the cost: images, and about the number of rows of each crop
_IMAGES, _ROWS = 64, 32
_TINY = 1e-12


@torch.no_grad()
def measure_inputs(global_crops: Tensor, crops: CropsConfig) -> dict[str, float]:
    """Return the statistics of one micro-batch by tag, with one host sync.

    Args:
        global_crops: stored values [views * images, H, W, channels], view-major.
    """
    views = crops.global_count
    rows = global_crops[:, :: max(1, global_crops.shape[1] // _ROWS)]
    rows = rows.unflatten(0, (views, -1))[:, :_IMAGES].flatten(0, 1)
    pixels = normalise(rows, crops.mean, crops.std, torch.float32, crops.value_range)
    statistics = {MEAN: pixels.mean(), STD: pixels.std(correction=0)}
    distance = max(1, pixels.shape[3] // 8)
    change = (pixels[..., distance:] - pixels[..., :-distance]).square().mean((1, 2, 3))
    variance = pixels.var((2, 3), correction=0).mean(1)
    statistics[STRUCTURE] = (1 - change / (2 * variance).clamp_min(_TINY)).square().mean().sqrt()
    detail = pixels.diff(dim=3).abs().mean((2, 3)).unflatten(0, (views, -1))
    if views > 1 and detail.shape[1] > 1:
        within = detail.var(0).mean()
        between = detail.mean(0).var(0).mean() - within / views
        statistics[VIEWS] = between / (between + within).clamp_min(_TINY)
    return dict(zip(statistics, torch.stack(list(statistics.values())).tolist(), strict=True))
