"""Detection of collapse: statistics of the teacher's assignments and features, measured every few steps.

teacher/entropy          mean entropy of the assignments to prototypes, in nats: 0 if each image has a single
                         prototype, log(prototypes) if each image has all of them equally
teacher/prototype_usage  prototypes that are the nearest of some image, as a share of the largest possible number
features/rank            effective rank of the CLS features: exp of the entropy of the singular values (RankMe,
                         Garrido et al. 2023, arXiv:2210.02885), from 1 to the number of images or dimensions
features/std             standard deviation of the normalised CLS features, times sqrt(dim): 0 if all are equal,
                         1 if their directions are random (Chen and He 2021, arXiv:2011.10566)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamtrain.config.monitor import CollapseConfig
from streamtrain.objective.prototypes import WeightHandle
from streamtrain.objective.sinkhorn import Assignment
from streamtrain.objective.targets import Targets
from streamtrain.ops.chunks import chunk_rows, chunks
from streamtrain.ops.collectives import gather_rows, world_size
from streamtrain.ops.logits import scaled_logits
from streamtrain.ops.prototypes import TINY

ENTROPY, USAGE, RANK, STD = "teacher/entropy", "teacher/prototype_usage", "features/rank", "features/std"
_KEYS = {ENTROPY: "entropy", USAGE: "usage", RANK: "rank", STD: "std"}
# measurements in a row that cause a warning: a single one may be due to similar images
IN_A_ROW = 3
_LOW = {
    ENTROPY: "the teacher assigns each image to a single prototype, possibly the same for all",
    USAGE: "few prototypes are the nearest of any image",
    RANK: "the features of all images span few dimensions",
    STD: "the features of all images are nearly equal",
}
_HIGH = "the teacher assigns each image to all prototypes equally"


@dataclass(frozen=True)
class CollapseMetrics:
    """Statistics of the teacher at one step by tag, equal on all ranks."""

    values: dict[str, float]
    # position of each value between its lowest (0) and highest (1) possible value
    shares: dict[str, float]


@torch.no_grad()
def measure_collapse(targets: Sequence[Targets], num_views: int, num_images: int, chunk_bytes: int) -> CollapseMetrics:
    """Measure the teacher that computed ``targets``, one entry per micro-batch; every rank calls this.

    Call it before the teacher is updated. It computes the images' logits once and has one host sync.

    Args:
        num_views: global crops per image.
        num_images: over all ranks.
        chunk_bytes: upper bound of one chunk's fp32 logits.
    """

    def first_views(pieces: Sequence[Tensor | None]) -> Tensor | None:
        """Return the rows of each image's first view, equally many on each rank, from view-major micro-batches."""
        views = [piece[: len(piece) // num_views] for piece in pieces if piece is not None]
        return torch.cat(views)[: -(-num_images // world_size())] if views else None

    cls = first_views([each.features.cls for each in targets])
    if cls is None:
        return CollapseMetrics({}, {})
    rows = gather_rows(cls.float())
    statistics = feature_statistics(rows)
    num_prototypes, first = 0, targets[0]
    features = first_views([each.features.global_features for each in targets])
    row = first_views([each.global_assignment.row for each in targets if each.global_assignment is not None])
    if features is not None and row is not None:
        assert first.global_assignment is not None and first.teacher_prototypes.global_head is not None
        assignment = Assignment(first.global_assignment.column, row)
        num_prototypes = len(assignment.column)
        statistics |= assignment_statistics(
            features, assignment, first.teacher_prototypes.global_head, first.teacher_temperature, chunk_bytes
        )
    values = dict(zip(statistics, torch.stack(list(statistics.values())).tolist(), strict=True))
    return CollapseMetrics(values, _shares(values, rows.shape[0], rows.shape[1], num_prototypes))


class CollapseDetector:
    """Warns of metrics outside the bounds of ``monitor.collapse``, in the same way on all ranks."""

    def __init__(self, config: CollapseConfig) -> None:
        self._start = config.start
        self._bounds = {
            ENTROPY: (config.min_entropy, config.max_entropy),
            USAGE: (config.min_usage, 1.0),
            RANK: (config.min_rank, 1.0),
            STD: (config.min_std, math.inf),
        }
        # by tag: bad measurements in a row, and whether a measurement was ever within its bounds
        self._bad: Counter[str] = Counter()
        self._was_good: set[str] = set()

    @property
    def num_out_of_bounds(self) -> int:
        """Number of tags that were out of bounds in their latest ``IN_A_ROW`` measurements or more."""
        return sum(count >= IN_A_ROW for count in self._bad.values())

    def warnings(self, step: int, metrics: CollapseMetrics) -> Iterator[str]:
        """Yield a warning for each tag that is out of bounds for the third time in a row.

        At initialisation all features are nearly equal, so before ``monitor.collapse.start`` a tag counts only after
        it has been within its bounds.
        """
        for tag, share in metrics.shares.items():
            low, high = self._bounds[tag]
            if not math.isfinite(share):
                continue  # reported as a non-finite step
            if low <= share <= high:
                self._was_good.add(tag)
                self._bad[tag] = 0
                continue
            self._bad[tag] += step >= self._start or tag in self._was_good
            if self._bad[tag] == IN_A_ROW:
                key, bound, meaning = ("max", high, _HIGH) if share > high else ("min", low, _LOW[tag])
                yield (
                    f"step {step}: {meaning}: {tag} is at {share:.3g} of its range, outside {bound:g} "
                    f"(monitor.collapse.{key}_{_KEYS[tag]}), {IN_A_ROW} times in a row; training may be collapsing"
                )


def feature_statistics(rows: Tensor) -> dict[str, Tensor]:
    """Return the effective rank and the standard deviation of fp32 ``rows [N, dim]``, as scalar tensors."""
    rows = torch.nn.functional.normalize(rows, dim=1)
    # squared singular values from the smaller Gram matrix; eigvalsh raises on non-finite values
    products = rows @ rows.T if rows.shape[0] < rows.shape[1] else rows.T @ rows
    singular = torch.linalg.eigvalsh(products.nan_to_num()).clamp_min(0).sqrt()
    rank = torch.special.entr(singular / singular.sum().clamp_min(TINY)).sum().exp()
    std = rows.std(0, correction=0).mean() * math.sqrt(rows.shape[1])
    return {RANK: rank.where(products.isfinite().all(), torch.nan), STD: std}


def assignment_statistics(
    features: Tensor, assignment: Assignment, handle: WeightHandle, temperature: float, chunk_bytes: int
) -> dict[str, Tensor]:
    """Return the entropy of the assignments and the usage of the prototypes over the rows of all ranks.

    Each rank passes its own ``features [n, d]`` and ``assignment``.
    """
    highest = torch.full_like(assignment.row, -torch.inf)
    nearest, entropy = torch.zeros_like(highest), torch.zeros_like(highest)
    with handle.gathered() as weight:
        num_prototypes = weight.shape[0]
        for part in chunks(num_prototypes, chunk_rows(chunk_bytes, len(features), num_prototypes)):
            logits = scaled_logits(features, weight[part], temperature)
            value, index = logits.max(1)
            nearest = torch.where(value > highest, (index + part.start).to(nearest.dtype), nearest)
            highest = torch.maximum(highest, value)
            entries = logits.add_(assignment.column[part]).add_(assignment.row[:, None]).exp_()
            entropy += torch.special.entr(entries).sum(1)
    # fp32 holds integers up to 2^24 exactly, more than the prototypes of any head
    nearest, entropy = gather_rows(torch.stack([nearest, entropy], 1)).unbind(1)
    used = torch.zeros(num_prototypes, device=nearest.device).index_fill_(0, nearest.long(), 1.0)
    return {ENTROPY: entropy.mean(), USAGE: used.sum() / min(len(nearest), num_prototypes)}


def _shares(values: dict[str, float], images: int, dim: int, num_prototypes: int) -> dict[str, float]:
    shares = {STD: values[STD]}
    if (most := min(images, dim)) > 1:
        shares[RANK] = (values[RANK] - 1) / (most - 1)
    if num_prototypes > 1:
        shares[ENTROPY] = values[ENTROPY] / math.log(num_prototypes)
        if (most := min(images, num_prototypes)) > 1:
            shares[USAGE] = (values[USAGE] * most - 1) / (most - 1)
    return shares
