from __future__ import annotations

import numpy as np
import pytest
import torch

from streamtrain.evaluation.logistic import PENALTIES, fit, logistic_accuracy


def features(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    centres = np.random.default_rng(0).normal(size=(5, 16))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, count)
    values = centres[labels] + 1.5 * rng.normal(size=(count, 16))
    return torch.from_numpy(values.astype(np.float32)), torch.from_numpy(labels)


@pytest.mark.parametrize("penalty", [1e-3, 1.0])
def test_finds_the_optimum_that_scikit_learn_finds(penalty: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    train, labels = features(1, 800)
    model = linear_model.LogisticRegression(C=penalty, tol=1e-8, max_iter=5000).fit(train.numpy(), labels.numpy())
    found = fit(train, labels, 5, penalty)
    # intercepts are determined up to a constant
    intercepts = found[-1] - found[-1].mean()
    torch.testing.assert_close(found[:-1].T, torch.from_numpy(model.coef_).double(), atol=2e-3, rtol=1e-2)
    expected = torch.from_numpy(model.intercept_ - model.intercept_.mean()).double()
    torch.testing.assert_close(intercepts, expected, atol=2e-3, rtol=1e-2)


def test_the_penalty_is_chosen_and_accuracy_is_that_of_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    (train, labels), (test, test_labels) = features(1, 1000), features(2, 1000)
    steps: list[int] = []
    result = logistic_accuracy(train, labels, test, test_labels, report=steps.append)
    assert result.penalty in PENALTIES and steps == list(range(1, len(PENALTIES) + 2))
    mean, deviation = train.mean(0), train.std(0)
    model = linear_model.LogisticRegression(C=result.penalty, max_iter=2000)
    model.fit(((train - mean) / deviation).numpy(), labels.numpy())
    expected = model.score(((test - mean) / deviation).numpy(), test_labels.numpy())
    assert 0.5 < expected < 0.99 and abs(result.accuracy - expected) <= 0.002
