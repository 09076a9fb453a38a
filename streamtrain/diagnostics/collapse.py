"""Whether the teacher still tells images apart: a look at some images' assignments and features every few steps.

    teacher/entropy          mean entropy of their assignments to prototypes, in nats: 0 where each image has one,
                             log(prototypes) where each has all alike
    teacher/prototype_usage  prototypes that are the nearest of some image, in parts of the most that there could be
    features/rank            effective rank of their CLS features: exp of the entropy of the singular values (RankMe,
                             Garrido et al. 2023, arXiv:2210.02885), 1 to the number of images or dimensions
    features/std             standard deviation of these features at length 1, times sqrt(dim): 0 where all are alike,
                             1 where their directions are as good as random (Chen and He 2021, arXiv:2011.10566)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from streamtrain.config.monitor import CollapseConfig
from streamtrain.objective.prototypes import WeightHandle
from streamtrain.objective.sinkhorn import TINY, Assignment
from streamtrain.objective.targets import Targets
from streamtrain.ops.collectives import gather_rows, world_size
from streamtrain.ops.logits import chunk_rows, chunks, scaled_logits

ENTROPY, USAGE, RANK, STD = "teacher/entropy", "teacher/prototype_usage", "features/rank", "features/std"
_KEYS = {ENTROPY: "entropy", USAGE: "usage", RANK: "rank", STD: "std"}
# looks in a row that must be bad: a single one may have met images that are alike
IN_A_ROW = 3
_LOW = {
    ENTROPY: "the teacher gives each image a single prototype, which may be the same for all",
    USAGE: "few prototypes are the nearest of all images",
    RANK: "the features of all images lie in few dimensions",
    STD: "the features of all images are nearly the same",
}
_HIGH = "the teacher gives each image all prototypes alike"


class Collapse:
    """Every rank has one and calls it alike; all see the same figures."""

    def __init__(self, config: CollapseConfig, num_views: int, chunk_bytes: int) -> None:
        """
        Args:
            num_views: global crops of an image.
            chunk_bytes: upper bound of one chunk's fp32 logits.
        """
        self._every, self._start, self._images = config.every, config.start, config.images
        self._bounds = {
            ENTROPY: (config.min_entropy, config.max_entropy),
            USAGE: (config.min_usage, 1.0),
            RANK: (config.min_rank, 1.0),
            STD: (config.min_std, math.inf),
        }
        self._num_views, self._chunk_bytes = num_views, chunk_bytes
        # the last look's values in parts of their range
        self._shares: dict[str, float] = {}
        # by tag: looks in a row that were bad; and what has been sound once
        self._bad: Counter[str] = Counter()
        self._been_sound: set[str] = set()

    @torch.no_grad()
    def scalars(self, step: int, targets: Sequence[Targets]) -> dict[str, float]:
        """What is to be logged of ``step`` (from 1) and its targets: nothing in most steps.

        It costs one sweep of the images' rows over the prototypes, and reads the device once.
        """
        self._shares = {}
        cls = self._rows([each.features.cls for each in targets])
        if not self._every or (step > 1 and step % self._every) or cls is None:
            return {}
        rows = gather_rows(cls.float(), None)
        found = feature_statistics(rows)
        num_prototypes, first = 0, targets[0]
        features = self._rows([each.features.global_features for each in targets])
        row = self._rows([each.global_assignment.row for each in targets if each.global_assignment is not None])
        if features is not None and row is not None:
            assert first.global_assignment is not None and first.teacher_prototypes.global_head is not None
            assignment = Assignment(first.global_assignment.column, row)
            num_prototypes = len(assignment.column)
            found |= assignment_statistics(
                features, assignment, first.teacher_prototypes.global_head, first.teacher_temperature, self._chunk_bytes
            )
        values = dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))
        self._shares = _shares(values, rows.shape[0], rows.shape[1], num_prototypes)
        return values

    def _rows(self, pieces: Sequence[Tensor | None]) -> Tensor | None:
        """Those of each image's first view, as many images on each rank; ``pieces``: view-major, one a micro-batch."""
        views = [piece[: len(piece) // self._num_views] for piece in pieces if piece is not None]
        return torch.cat(views)[: -(-self._images // world_size(None))] if views else None

    def warnings(self, step: int) -> Iterator[str]:
        """What to tell of the look at ``step``, if there was one; of several bad ones, the third in a row is told.

        Networks begin alike for all images, so that before ``monitor.collapse.start`` only what has been sound can
        turn bad.
        """
        for tag, share in self._shares.items():
            low, high = self._bounds[tag]
            if not math.isfinite(share):
                continue  # told of elsewhere
            if low <= share <= high:
                self._been_sound.add(tag)
                self._bad[tag] = 0
                continue
            self._bad[tag] += step >= self._start or tag in self._been_sound
            if self._bad[tag] == IN_A_ROW:
                key, bound, meaning = ("max", high, _HIGH) if share > high else ("min", low, _LOW[tag])
                yield (
                    f"step {step}: {meaning}: {tag} is at {share:.3g} of its range, not within {bound:g} "
                    f"(monitor.collapse.{key}_{_KEYS[tag]}), {IN_A_ROW} times in a row; the training may be collapsing"
                )


def feature_statistics(rows: Tensor) -> dict[str, Tensor]:
    """Effective rank and standard deviation of fp32 ``rows [N, dim]``, as scalars."""
    rows = torch.nn.functional.normalize(rows, dim=1)
    # squares of the singular values, from the smaller side; what is not finite cannot be decomposed
    products = rows @ rows.T if rows.shape[0] < rows.shape[1] else rows.T @ rows
    singular = torch.linalg.eigvalsh(products.nan_to_num()).clamp_min(0).sqrt()
    rank = torch.special.entr(singular / singular.sum().clamp_min(TINY)).sum().exp()
    std = rows.std(0, correction=0).mean() * math.sqrt(rows.shape[1])
    return {RANK: rank.where(products.isfinite().all(), torch.nan), STD: std}


def assignment_statistics(
    features: Tensor, assignment: Assignment, handle: WeightHandle, temperature: float, chunk_bytes: int
) -> dict[str, Tensor]:
    """Entropy of the assignments, and usage of the prototypes, over all ranks' rows; this one's ``features [n, d]``."""
    highest = torch.full_like(assignment.row, -torch.inf)
    nearest, entropy = torch.zeros_like(highest), torch.zeros_like(highest)
    with handle.gathered() as weight:
        num_prototypes = weight.shape[0]
        for part in chunks(num_prototypes, chunk_rows(chunk_bytes, len(features), num_prototypes)):
            logits = scaled_logits(features, weight[part], temperature)
            value, place = logits.max(1)
            nearest = torch.where(value > highest, (place + part.start).to(nearest.dtype), nearest)
            highest = torch.maximum(highest, value)
            entries = logits.add_(assignment.column[part]).add_(assignment.row[:, None]).exp_()
            entropy += torch.special.entr(entries).sum(1)
    # fp32 holds whole numbers up to 2^24, and no head has as many prototypes
    nearest, entropy = gather_rows(torch.stack([nearest, entropy], 1), None).unbind(1)
    used = torch.zeros(num_prototypes, device=nearest.device).index_fill_(0, nearest.long(), 1.0)
    return {ENTROPY: entropy.mean(), USAGE: used.sum() / min(len(nearest), num_prototypes)}


def _shares(values: dict[str, float], images: int, dim: int, num_prototypes: int) -> dict[str, float]:
    """Where each value lies between the least (0) and the most (1) that it could be."""
    shares = {STD: values[STD]}
    if (most := min(images, dim)) > 1:
        shares[RANK] = (values[RANK] - 1) / (most - 1)
    if num_prototypes > 1:
        shares[ENTROPY] = values[ENTROPY] / math.log(num_prototypes)
        if (most := min(images, num_prototypes)) > 1:
            shares[USAGE] = (values[USAGE] * most - 1) / (most - 1)
    return shares
