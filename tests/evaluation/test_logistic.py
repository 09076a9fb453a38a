from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.logistic import PENALTIES, logistic_accuracy


def features(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    centres = np.random.default_rng(0).normal(size=(5, 16))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, count)
    values = centres[labels] + 1.5 * rng.normal(size=(count, 16))
    return torch.from_numpy(values.astype(np.float32)), torch.from_numpy(labels)


def test_accuracy_is_that_of_the_chosen_penalty() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    (train, labels), (test, test_labels) = features(1, 1000), features(2, 1000)
    steps: list[int] = []
    # features may be inference tensors
    with torch.inference_mode():
        train, test = train.clone(), test.clone()
    result = logistic_accuracy(train, labels, test, test_labels, report=steps.append)
    assert result.penalty in PENALTIES and steps == list(range(1, len(PENALTIES) + 2))
    mean, deviation = train.mean(0), train.std(0)
    model = linear_model.LogisticRegression(C=result.penalty, max_iter=2000)
    model.fit(((train - mean) / deviation).numpy(), labels.numpy())
    expected = model.score(((test - mean) / deviation).numpy(), test_labels.numpy())
    assert 0.5 < expected < 0.99 and abs(result.accuracy - expected) <= 0.002


def test_the_penalty_is_chosen_without_the_test_data() -> None:
    pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    (train, labels), (test, test_labels) = features(1, 400), features(2, 400)
    result = logistic_accuracy(train, labels, test, test_labels)
    wrong = logistic_accuracy(train, labels, test, (test_labels + 1) % 5)
    assert wrong.penalty == result.penalty and wrong.accuracy < 0.3 < result.accuracy
    # one strong and one weak penalty have different accuracies, so the choice matters
    assert logistic_accuracy(train, labels, test, test_labels, penalties=(1e-12,)).accuracy < result.accuracy


def test_a_single_class_is_an_error() -> None:
    pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    train, labels = features(1, 40)
    with pytest.raises(StreamtrainError, match="at least two classes"):
        logistic_accuracy(train, torch.zeros_like(labels), train, labels)


def test_without_scikit_learn_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    monkeypatch.setitem(sys.modules, "sklearn.exceptions", None)
    train, labels = features(1, 40)
    with pytest.raises(StreamtrainError) as caught:
        logistic_accuracy(train, labels, train, labels)
    assert str(caught.value) == 'evaluate logistic needs scikit-learn: pip install "streamtrain[eval]"'
