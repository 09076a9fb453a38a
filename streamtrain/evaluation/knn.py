"""Weighted nearest-neighbour classification of frozen features, exact and in bounded memory.

As in Wu et al. 2018 (section 3.4) and DINO (Caron et al. 2021), each of the k neighbours votes for its class with
weight exp(cosine similarity / temperature).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from streamtrain.ops.collectives import gather_rows, max_over_ranks, world_size
from streamtrain.planning.host import SIMILARITY_BYTES

NEIGHBOURS = (10, 20)
TEMPERATURE = 0.07


def nearest(
    queries: Tensor, bank: Tensor, count: int, chunk_bytes: int = SIMILARITY_BYTES,
    report: Callable[[int], object] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Find the ``count`` rows of ``bank`` with the largest dot product with each query, best first.

    Args:
        queries: [M, D].
        bank: [N, D]; N >= ``count``.
        chunk_bytes: similarities in memory at a time.
        report: called with the number of queries of each part that is done.

    Returns:
        similarities [M, count] and rows of the bank int64 [M, count].
    """
    bank_rows = min(len(bank), max(count, 65_536))
    query_rows = max(chunk_bytes // (bank_rows * queries.element_size()), 1)
    values, indices = [], []
    for part in queries.split(query_rows):
        best_values = part.new_full((len(part), 0), 0.0)
        best_indices = torch.empty(len(part), 0, dtype=torch.int64, device=part.device)
        for start in range(0, len(bank), bank_rows):
            similarities = part @ bank[start : start + bank_rows].T
            found_values, found = similarities.topk(min(count, similarities.shape[1]), dim=1)
            joined = torch.cat([best_values, found_values], dim=1)
            best_values, order = joined.topk(min(count, joined.shape[1]), dim=1)
            best_indices = torch.cat([best_indices, found + start], dim=1).gather(1, order)
        values.append(best_values)
        indices.append(best_indices)
        if report is not None:
            report(len(part))
    return torch.cat(values), torch.cat(indices)


@dataclass(frozen=True)
class Rows:
    """This rank's part of labelled features; all ranks have the same number of rows, padded with label -1."""

    # [n, dim]
    features: Tensor
    # int64 [n]
    labels: Tensor


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    chunk_bytes: int = SIMILARITY_BYTES,
    report: Callable[[int], object] | None = None,
) -> dict[int, Tensor]:
    """Predict the labels int64 [M] of ``test_features`` [M, D] for each number of neighbours.

    Features need not be normalised. A number of neighbours above N counts as N. ``report`` is called as by ``nearest``.
    """
    bank, queries = F.normalize(train_features, dim=1), F.normalize(test_features, dim=1)
    similarities, rows = nearest(queries, bank, min(max(neighbours), len(bank)), chunk_bytes, report)
    return _vote(similarities, train_labels[rows], int(train_labels.max()) + 1, neighbours, temperature)


def knn_predict_over_ranks(
    train: Rows,
    test: Rows,
    chunk_bytes: int = SIMILARITY_BYTES,
) -> tuple[dict[int, Tensor], Tensor]:
    """Predict like ``knn_predict`` from features spread over ranks; all ranks get all predictions and labels.

    Each rank searches its own rows only; the best of every rank are gathered and merged.
    """
    is_image = train.labels >= 0
    bank, labels = F.normalize(train.features[is_image], dim=1), train.labels[is_image]
    queries = gather_rows(F.normalize(test.features, dim=1))
    expected = gather_rows(test.labels)
    queries, expected = queries[expected >= 0], expected[expected >= 0]
    classes = int(max_over_ranks(train.labels.max()[None])) + 1
    most = max(NEIGHBOURS)
    predictions: dict[int, list[Tensor]] = {count: [] for count in NEIGHBOURS}
    for part in queries.split(max(chunk_bytes // (24 * most * world_size()), 1)):
        similarities = part.new_full((most, len(part)), -torch.inf)
        found = torch.zeros(most, len(part), dtype=torch.int64, device=part.device)
        if len(bank):
            values, rows = nearest(part, bank, min(most, len(bank)), chunk_bytes)
            similarities[: values.shape[1]], found[: values.shape[1]] = values.T, labels[rows].T
        similarities, order = gather_rows(similarities).T.sort(dim=1, descending=True, stable=True)
        found = gather_rows(found).T.gather(1, order)
        votes = _vote(similarities[:, :most], found[:, :most], classes, NEIGHBOURS, TEMPERATURE)
        for count, guess in votes.items():
            predictions[count].append(guess)
    return {count: torch.cat(parts) for count, parts in predictions.items()}, expected


def _vote(
    similarities: Tensor, labels: Tensor, classes: int, neighbours: Sequence[int], temperature: float
) -> dict[int, Tensor]:
    """Return the winning label for each number of neighbours; ``similarities`` and ``labels`` [M, k], best first."""
    # subtracting the best similarity avoids overflow at any temperature and does not change the winner
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    votes = weights.new_zeros(len(labels), classes)
    predictions = {}
    for count in neighbours:
        votes.zero_().scatter_add_(1, labels[:, :count], weights[:, :count])
        predictions[count] = votes.argmax(1)
    return predictions


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[int, float]:
    """Return the accuracy for each number of neighbours."""
    predictions = knn_predict(train_features, train_labels, test_features, neighbours, temperature)
    return {count: float((guess == test_labels).double().mean()) for count, guess in predictions.items()}
