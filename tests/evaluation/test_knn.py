from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from streamtrain.evaluation.knn import knn_accuracy, knn_predict, nearest


def reference(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, neighbours: int, temperature: float
) -> np.ndarray:
    """Predict by the definition, one test row at a time in float64."""
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    predictions = []
    for row in test / np.linalg.norm(test, axis=1, keepdims=True):
        similarities = train @ row
        votes = np.zeros(labels.max() + 1)
        for index in np.argsort(-similarities)[:neighbours]:
            votes[labels[index]] += np.exp(similarities[index] / temperature)
        predictions.append(votes.argmax())
    return np.array(predictions)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_train=st.integers(25, 300),
    num_test=st.integers(1, 40),
    classes=st.integers(1, 7),
    chunk_bytes=st.sampled_from([1, 4000, 2**28]),
)
def test_predictions_equal_the_definition(
    seed: int, num_train: int, num_test: int, classes: int, chunk_bytes: int
) -> None:
    rng = np.random.default_rng(seed)
    train, test = rng.normal(size=(num_train, 12)), rng.normal(size=(num_test, 12))
    labels = rng.integers(0, classes, num_train)
    predictions = knn_predict(
        *map(torch.from_numpy, (train, labels, test)), neighbours=(1, 10, 20), chunk_bytes=chunk_bytes
    )
    for count, labels_found in predictions.items():
        assert np.array_equal(labels_found.numpy(), reference(train, labels, test, count, 0.07))


def test_chunks_do_not_change_the_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(200_000, 4, generator=generator)
    queries = torch.randn(7, 4, generator=generator)
    values, rows = nearest(queries, bank, 20, chunk_bytes=2**20)
    expected_values, expected_rows = (queries @ bank.T).topk(20, dim=1)
    assert torch.equal(rows, expected_rows)
    torch.testing.assert_close(values, expected_values)


def clusters(count: int, seed: int, dim: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Return features float32 [count, dim] of ten overlapping classes, and labels."""
    centres = np.random.default_rng(0).normal(size=(10, dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    return (centres[labels] + 1.6 * rng.normal(size=(count, dim))).astype(np.float32), labels


def test_predictions_equal_scikit_learn_by_brute_force() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is not installed")
    (train, labels), (test, test_labels) = clusters(20_000, 1), clusters(4000, 2)
    tensors = map(torch.from_numpy, (train, labels, test))
    classifier = neighbors.KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda distances: np.exp((1 - distances) / 0.07)
    ).fit(train, labels)
    expected = classifier.predict(test)
    assert 0.5 < (expected == test_labels).mean() < 0.999
    assert np.array_equal(knn_predict(*tensors)[20].numpy(), expected)


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    (train, labels), (test, test_labels) = clusters(20_000, 1), clusters(4001, 2)
    np.savez(tmp_path / "features.npz", train=train, labels=labels, test=test, test_labels=test_labels)
    script = Path(__file__).with_name("knn_over_ranks.py")
    results = run_ranks([script, tmp_path], 2)
    assert [code for code, _, _ in results] == [0, 0], results[0][2][-2000:]
    expected = knn_predict(*map(torch.from_numpy, (train, labels, test)))
    # ranks take every second row
    order = np.concatenate([np.arange(0, 4001, 2), np.arange(1, 4001, 2)])
    for rank in range(2):
        arrays = np.load(tmp_path / f"predictions-{rank}.npz")
        assert np.array_equal(arrays["expected"], test_labels[order])
        for count in (10, 20):
            assert np.array_equal(arrays[f"knn_{count}"], expected[count].numpy()[order])


def test_feature_scale_is_ignored_and_few_samples_are_enough() -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(8, 5, generator=generator), torch.randn(6, 5, generator=generator)
    labels, test_labels = torch.arange(8) % 2, torch.arange(6) % 2
    small = knn_accuracy(train, labels, test, test_labels)
    assert small == knn_accuracy(1e3 * train, labels, 1e-3 * test, test_labels)
    assert small[10] == small[20]
    assert knn_accuracy(train, labels, train, labels, neighbours=(1,), temperature=1e-4) == {1: 1.0}
