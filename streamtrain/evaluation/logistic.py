"""Logistic regression on frozen features: convex, so that its optimum, unlike a probe's, depends on no training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shards.randomness import permutation

# inverse strengths of the penalty, as scikit-learn's C
PENALTIES = tuple(10.0 ** (exponent / 2) for exponent in range(-10, 5))
HELD_OUT_SHARE = 0.1
_PURPOSE = "evaluation/logistic"


@dataclass(frozen=True)
class LogisticResult:
    """Share of the test labels predicted rightly with the penalty that did best on held-out training data."""

    accuracy: float
    penalty: float


def logistic_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
    report: Callable[[int], object] | None = None,
) -> LogisticResult:
    """Fit features [N, D], standardised by the training data's mean and deviation, to labels int64 [N].

    A tenth of the training data, never of the test data, chooses among ``penalties``; the regression is then fitted
    anew to all of it. ``report`` is called with the fits done after each.
    """
    mean, deviation = train_features.mean(0), train_features.std(0).clamp_min(1e-6)
    train, test = (train_features - mean) / deviation, (test_features - mean) / deviation
    num_classes = int(torch.maximum(train_labels.max(), test_labels.max())) + 1
    best = penalties[0]
    if len(penalties) > 1:
        order = torch.from_numpy(permutation(seed, _PURPOSE, len(train), 0)).to(train.device)
        num_held = max(int(len(train) * HELD_OUT_SHARE), 1)
        held, kept = order[:num_held], order[num_held:]
        scores, start = [], None
        # from the strongest on, each from the optimum of the one before
        for index, penalty in enumerate(sorted(penalties)):
            start = fit(train[kept], train_labels[kept], num_classes, penalty, start)
            scores.append(_accuracy(train[held], train_labels[held], start))
            if report is not None:
                report(index + 1)
        best = sorted(penalties)[int(torch.tensor(scores).argmax())]
    coefficients = fit(train, train_labels, num_classes, best)
    if report is not None:
        report(len(penalties) + 1)
    return LogisticResult(_accuracy(test, test_labels, coefficients), best)


def fit(features: Tensor, labels: Tensor, num_classes: int, penalty: float, start: Tensor | None = None) -> Tensor:
    """Coefficients fp64 [D + 1, classes], the last row being the intercepts, which are not penalised.

    They minimise the cross-entropy summed over samples, times ``penalty``, plus half the squared norm: the multinomial
    regression of scikit-learn. L-BFGS from ``start``, or from 0.
    """
    inputs = F.pad(features.double(), (0, 1), value=1.0)
    start = inputs.new_zeros(inputs.shape[1], num_classes) if start is None else start
    coefficients = start.clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [coefficients], max_iter=1000, history_size=20, line_search_fn="strong_wolfe",
        tolerance_grad=1e-6, tolerance_change=1e-10,
    )  # fmt: skip

    def closure() -> Tensor:
        optimiser.zero_grad()
        # in units of one sample, so that the tolerances mean the same whatever their number
        loss = F.cross_entropy(inputs @ coefficients, labels)
        loss = loss + 0.5 * coefficients[:-1].square().sum() / (penalty * len(inputs))
        loss.backward()
        return loss

    optimiser.step(closure)
    return coefficients.detach()


def _accuracy(features: Tensor, labels: Tensor, coefficients: Tensor) -> float:
    scores = F.pad(features.double(), (0, 1), value=1.0) @ coefficients
    return float((scores.argmax(1) == labels).double().mean())
