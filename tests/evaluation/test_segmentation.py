"""Segmentation from patch features agrees with scikit-learn, with NumPy and with direct counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from mapped_folders import mapped_folder

from shards.format.pixels import RGB
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation import segmentation
from streamtrain.evaluation.knn import TEMPERATURE
from streamtrain.evaluation.label_maps import CLASS_IDS, MappedImages, open_mapped, split_mapped
from streamtrain.evaluation.patches import PatchNetwork, feature_batches, upsampled
from streamtrain.evaluation.segmentation import (
    NEIGHBOURS,
    class_iou,
    count_pixels,
    held_first,
    knn_classes,
    majority_classes,
    mean_iou,
    pixel_accuracy,
    sample,
    segment,
    training_patches,
)

PIXELS = PatchNetwork(None, 8, 32, 32, (0.5,) * 3, (0.25,) * 3, ((0.0, 255.0),), "cpu")


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> MappedImages:
    folder = mapped_folder(tmp_path_factory.mktemp("segmentation"), 40)
    return open_mapped(folder / "images", folder / "masks", CLASS_IDS, RGB)


def test_iou_is_that_of_a_direct_count() -> None:
    rng = np.random.default_rng(0)
    expected, guess = rng.integers(0, 4, (2, 5, 300))
    expected[:, :20], guess[:, :20] = 2, 2
    # class 3 is predicted, but not labelled
    expected[expected == 3] = 1
    sums = np.stack([count_pixels(*pair) for pair in zip(expected, guess, strict=True)])
    direct = [
        ((expected == number) & (guess == number)).sum() / ((expected == number) | (guess == number)).sum()
        for number in range(3)
    ]
    np.testing.assert_allclose(class_iou(sums.sum(0)), [*direct, np.nan])
    assert mean_iou(sums.sum(0)) == pytest.approx(np.mean(direct))
    np.testing.assert_allclose(mean_iou(sums)[1], mean_iou(sums[1]))
    assert pixel_accuracy(sums.sum(0)) == pytest.approx((expected == guess).mean())


def test_the_class_of_a_patch_is_that_of_most_of_its_labelled_pixels() -> None:
    labels = np.random.default_rng(1).integers(-1, 5, (24, 24)).astype(np.int16)
    labels[:8, :8] = -1
    labels[8:16, 8:16], labels[8, 8] = -1, 4
    found = majority_classes(labels, 3).reshape(3, 3)
    assert found[0, 0] == -1 and found[1, 1] == 4
    for row, column in ((0, 1), (2, 0), (2, 2)):
        patch = labels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert found[row, column] == np.bincount(patch[patch >= 0]).argmax()
    assert (majority_classes(np.full((24, 24), -1, np.int16), 3) == -1).all()


def test_samples_are_bounded_repeatable_and_labelled() -> None:
    chosen = np.random.default_rng(2).random(500) < 0.3
    assert np.array_equal(sample(chosen, 500, "x", 0), np.flatnonzero(chosen))
    first = sample(chosen, 20, "x", 7)
    assert len(first) == 20 and chosen[first].all() and np.array_equal(first, sample(chosen, 20, "x", 7))
    assert not np.array_equal(first, sample(chosen, 20, "x", 8))


def test_whole_images_are_held_out() -> None:
    images = torch.arange(20).repeat_interleave(10) + 100
    order = held_first(images)
    assert sorted(order.tolist()) == list(range(200))
    assert len(set(images[order[:20]].tolist())) == 2


def test_neighbours_are_those_of_brute_force(mapped: MappedImages) -> None:
    rows = training_patches(PIXELS, mapped)
    features = next(iter(feature_batches(PIXELS, mapped)))[1][:3] + 0.3
    found = knn_classes(rows, features)
    bank = rows.patches.double().numpy()
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    queries = features.flatten(0, 1).double().numpy()
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    similarities = queries @ bank.T
    nearest = np.argsort(-similarities, axis=1)[:, :NEIGHBOURS]
    weights = np.exp(np.take_along_axis(similarities, nearest, 1) / TEMPERATURE)
    classes = rows.patch_classes.numpy()[nearest]
    votes = np.stack([(weights * (classes == number)).sum(1) for number in range(4)], 1)
    assert (votes.argmax(1) == found.flatten().numpy()).mean() > 0.99


def test_the_probe_is_as_accurate_as_logistic_regression(mapped: MappedImages, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same pixels: the share of correct test pixels differs by less than two points."""
    monkeypatch.setattr(segmentation, "MAX_PIXELS", 3000)
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    train, test = split_mapped(mapped)
    found = segment(PIXELS, train, test)
    rows = training_patches(PIXELS, train)
    mean, deviation = rows.pixels.mean(0), rows.pixels.std(0)
    model = linear_model.LogisticRegression(C=0.01, max_iter=200)
    model.fit(((rows.pixels - mean) / deviation).numpy(), rows.pixel_classes.numpy())
    is_right, num_labelled = 0, 0
    for _, features, maps in feature_batches(PIXELS, test):
        for one, labels in zip(features, maps, strict=True):
            pixels = ((upsampled(one, 4, 32) - mean) / deviation).flatten(0, 1).numpy()
            guess, expected = model.predict(pixels), labels.ravel()
            is_right += int((guess == expected)[expected >= 0].sum())
            num_labelled += int((expected >= 0).sum())
    accuracy = float(pixel_accuracy(found.counts["linear"].sum(0)))
    assert found.counts["linear"][:, 0].sum() == num_labelled
    assert accuracy > 0.6 and abs(accuracy - is_right / num_labelled) < 0.02


def test_bounds_of_pixels_and_patches_hold(mapped: MappedImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentation, "MAX_PIXELS", 100)
    monkeypatch.setattr(segmentation, "MAX_PATCHES", 30)
    found = segment(PIXELS, mapped, mapped)
    assert 20 < found.train_images <= 30
    assert found.train_patches == found.train_images and found.train_pixels == 3 * found.train_images
    assert found.counts["knn"].shape == (40, 3, 4)
    monkeypatch.setattr(segmentation, "MAX_BYTES", 4 * 192 * 40)
    assert len(training_patches(PIXELS, mapped).pixels) == 40


def test_labels_of_one_class_are_refused(mapped: MappedImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentation, "MAX_PIXELS", 100)
    with pytest.raises(StreamtrainError, match="have the same class"):
        segment(PIXELS, replace(mapped, ignored=(3,)), mapped)
    with pytest.raises(StreamtrainError, match="labelled pixel"):
        segment(PIXELS, replace(mapped, ignored=(0, 3)), mapped)
    with pytest.raises(StreamtrainError, match="two are needed"):
        segment(PIXELS, mapped, replace(mapped, ignored=(0, 3)))
