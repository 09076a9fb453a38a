from __future__ import annotations

import numpy as np
import pytest
import torch

from streamtrain.evaluation.linear import linear_accuracy


def features(seed: int, count: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    centres = np.random.default_rng(0).normal(size=(10, 32))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    # feature scales differ a thousandfold, as between networks
    scales = np.logspace(-2, 1, 32)
    return torch.from_numpy(((centres[labels] + noise * rng.normal(size=(count, 32))) * scales).astype(np.float32)), (
        torch.from_numpy(labels)
    )


def test_accuracy_is_within_half_a_point_of_logistic_regression() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    train, train_labels = features(1, 12_000, 1.8)
    test, test_labels = features(2, 4000, 1.8)
    steps: list[int] = []
    result = linear_accuracy(train, train_labels, test, test_labels, report=steps.append)
    deviation = train.std(0)
    model = linear_model.LogisticRegression(max_iter=1000).fit((train / deviation).numpy(), train_labels.numpy())
    expected = model.score((test / deviation).numpy(), test_labels.numpy())
    assert 0.5 < expected < 0.95  # neither trivial nor hopeless
    assert abs(result.accuracy - expected) < 0.005
    assert steps == list(range(1, 61))


def test_results_repeat_and_test_data_do_not_choose_the_learning_rate() -> None:
    train, train_labels = features(1, 500, 1.0)
    test, test_labels = features(2, 200, 1.0)
    first = linear_accuracy(train, train_labels, test, test_labels, epochs=5)
    assert first == linear_accuracy(train, train_labels, test, test_labels, epochs=5)
    wrong = linear_accuracy(train, train_labels, test, (test_labels + 1) % 10, epochs=5)
    assert wrong.learning_rate == first.learning_rate
    assert wrong.accuracy < 0.3 < first.accuracy


def test_two_samples_are_enough() -> None:
    train, train_labels = torch.randn(2, 3), torch.tensor([0, 1])
    result = linear_accuracy(train, train_labels, train, train_labels, epochs=2)
    assert 0.0 <= result.accuracy <= 1.0
