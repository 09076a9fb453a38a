"""Anchor to the starting network: keeps features of continued training close to the weights that it started from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamtrain.objective.feature_losses import cosine_loss
from streamtrain.objective.gram import gram_loss


@dataclass(frozen=True)
class AnchorTargets:
    """The starting network's features of one micro-batch; called with the student's features.

    The starting network gets the unmasked global crops, the student the masked ones. All patches are compared, because
    masked ones also must be predicted as the starting network would see them.
    """

    # [images, dim]; None: CLS features are not compared
    cls: Tensor | None
    # [images, num_patches, dim]; None: patches are not compared
    patches: Tensor | None
    # compare similarities between patches, instead of each patch
    with_gram: bool
    chunk_bytes: int

    def __call__(self, cls: Tensor, patches: Tensor | None) -> Tensor:
        """Return the loss of the student's ``cls [images, dim]`` and ``patches [images, num_patches, dim]``.

        It is the mean of 1 − cosine similarity over CLS features, plus the Gram loss within each image, or the mean of
        1 − cosine similarity over patches.
        """
        terms = [] if self.cls is None else [_mean_distance(cls, self.cls)]
        if self.patches is not None:
            assert patches is not None, "the anchor compares patches, but the student computed none"
            if self.with_gram:
                terms.append(gram_loss(patches, self.patches, None, "image", "keep", self.chunk_bytes))
            else:
                terms.append(_mean_distance(patches.flatten(0, 1), self.patches.flatten(0, 1)))
        return torch.stack(terms).sum()


def _mean_distance(student: Tensor, start: Tensor) -> Tensor:
    """Return the mean of 1 − cosine similarity of the rows ``[M, dim]``: fp32 scalar."""
    weight = torch.full(student.shape[:1], 1.0 / len(student), device=student.device)
    return cosine_loss(student, start, weight)
