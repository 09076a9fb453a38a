"""Anchor loss: keeps features of continued training close to the starting network's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamtrain.objective.feature_distillation import same_view_loss
from streamtrain.objective.gram import gram_loss


@dataclass(frozen=True)
class AnchorTargets:
    """The starting network's features of one micro-batch; called with the student's features.

    The starting network sees the global crops unmasked, the student sees them masked. All patches are compared, so that
    the student predicts the masked ones as the starting network sees them.
    """

    # [images, dim]; None: CLS features are not compared
    cls: Tensor | None
    # [images, num_patches, dim]; None: patches are not compared
    patches: Tensor | None
    # compare the similarities between patches instead of each patch
    with_gram: bool
    chunk_bytes: int

    def __call__(self, cls: Tensor, patches: Tensor | None) -> Tensor:
        """Return the loss of the student's ``cls [images, dim]`` and ``patches [images, num_patches, dim]``.

        The fp32 scalar is the sum of two terms: the mean of 1 − cosine similarity over CLS features, and either the
        Gram loss within each image or the mean of 1 − cosine similarity over patches.
        """
        terms = [] if self.cls is None else [same_view_loss("cosine", cls, self.cls)]
        if self.patches is not None:
            assert patches is not None, "the anchor compares patches, but the student computed none"
            if self.with_gram:
                terms.append(gram_loss(patches, self.patches, None, "image", "keep", self.chunk_bytes))
            else:
                terms.append(same_view_loss("cosine", patches, self.patches))
        return torch.stack(terms).sum()
