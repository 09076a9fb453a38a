"""How evenly the teacher uses its prototypes, before any centring."""

from __future__ import annotations

import torch
from torch import Tensor

from streamtrain.objective.logits import RowLogSumExp, chunk_rows, chunks, scaled_logits
from streamtrain.objective.prototypes import WeightHandle


@torch.no_grad()
def prototype_mass(features: Tensor, handle: WeightHandle, temperature: float, chunk_bytes: int) -> Tensor:
    """``[K]``: the mean over ``features [N, d]`` of ``softmax(logits / temperature)``, times K; 1 if all are alike."""
    with handle.gathered() as weight:
        size = chunk_rows(chunk_bytes, len(features), weight.shape[0])
        normaliser = RowLogSumExp(len(features), features)
        for part in chunks(weight.shape[0], size):
            normaliser.add(scaled_logits(features, weight[part], temperature))
        row = normaliser.value()[:, None]
        return torch.cat(
            [
                scaled_logits(features, weight[part], temperature).sub_(row).exp_().mean(0) * weight.shape[0]
                for part in chunks(weight.shape[0], size)
            ]
        )
