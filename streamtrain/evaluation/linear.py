"""Linear probe on frozen features: all learning rates trained together, the best chosen on held-out training data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from shards.randomness import permutation

LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
HELD_OUT_SHARE = 0.1
EPOCHS = 60
BATCH_SIZE = 1024
_PURPOSE = "evaluation/linear"


@dataclass(frozen=True)
class LinearResult:
    """Test accuracy of the probe whose learning rate has the highest accuracy on held-out training data."""

    accuracy: float
    learning_rate: float
    # bool [M]: which test images are predicted correctly
    is_right: Tensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of features that are first standardised."""

    # [D]
    mean: Tensor
    deviation: Tensor
    # [D, classes], [1, classes]
    weight: Tensor
    bias: Tensor
    learning_rate: float

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits [..., classes] of features [..., D]."""
        return (features - self.mean) / self.deviation @ self.weight + self.bias[0]


def linear_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    epochs: int = EPOCHS,
    report: Callable[[int], object] | None = None,
) -> LinearResult:
    """Train a linear probe and return its test accuracy; arguments as ``train_probe``, test labels int64 [M]."""
    num_classes = int(torch.maximum(train_labels.max(), test_labels.max())) + 1
    probe = train_probe(train_features, train_labels, num_classes, epochs, report)
    test = (test_features - probe.mean) / probe.deviation
    is_right = _is_right(test, test_labels, probe.weight[None], probe.bias[None])[0]
    return LinearResult(float(is_right.double().mean()), probe.learning_rate, is_right)


def train_probe(
    train_features: Tensor,
    train_labels: Tensor,
    num_classes: int,
    epochs: int = EPOCHS,
    report: Callable[[int], object] | None = None,
    order: Tensor | None = None,
) -> LinearProbe:
    """Train linear classifiers by SGD with momentum and a cosine schedule, and return the best.

    The learning rate is chosen on a held-out tenth of the training data. Features are standardised by the mean and
    deviation of the training data, so that one grid of learning rates suits every network.

    Args:
        train_features: fp32 [N, D].
        train_labels: int64 [N].
        report: called after each epoch with the number of completed epochs.
        order: int64 [N], a permutation whose first tenth is held out; default: a random one.
    """
    mean, deviation = train_features.mean(0), train_features.std(0).clamp_min(1e-6)
    train = (train_features - mean) / deviation
    if order is None:
        order = torch.from_numpy(permutation(0, _PURPOSE, len(train), 0))
    order = order.to(train.device)
    num_held = max(int(len(train) * HELD_OUT_SHARE), 1)
    held, kept = order[:num_held], order[num_held:]

    # one matrix for the classifiers of all learning rates: many narrow matmuls take several times as long
    shape = (len(LEARNING_RATES), num_classes)
    weight, bias = train.new_zeros(train.shape[1], math.prod(shape)), train.new_zeros(1, math.prod(shape))
    state = [(value, torch.zeros_like(value)) for value in (weight, bias)]
    rates = train.new_tensor(LEARNING_RATES).repeat_interleave(num_classes)
    batches = -(-len(kept) // BATCH_SIZE)
    for epoch in range(epochs):
        shuffled = kept[torch.from_numpy(permutation(0, _PURPOSE, len(kept), epoch + 1)).to(train.device)]
        for index, rows in enumerate(shuffled.split(BATCH_SIZE)):
            progress = (epoch * batches + index) / (epochs * batches)
            scale = 0.5 * (1 + torch.cos(torch.tensor(progress * torch.pi))).item()
            features = train[rows]
            # gradient of the mean cross-entropy of all classifiers, in closed form
            shares = (features @ weight + bias).unflatten(1, shape).softmax(-1)
            error = (shares - F.one_hot(train_labels[rows], num_classes)[:, None]).flatten(1)
            gradients = (features.T @ error / len(rows), error.mean(0, keepdim=True))
            for (value, velocity), gradient in zip(state, gradients, strict=True):
                velocity.mul_(0.9).add_(gradient)
                value.addcmul_(velocity, rates, value=-scale)
        if report is not None:
            report(epoch + 1)

    weight, bias = (value.unflatten(1, shape).transpose(0, 1) for value in (weight, bias))
    best = int(_is_right(train[held], train_labels[held], weight, bias).double().mean(1).argmax())
    return LinearProbe(mean, deviation, weight[best], bias[best], LEARNING_RATES[best])


def _is_right(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return bool [G, N]: which features each of the G classifiers predicts correctly."""
    pairs = zip(features.split(4096), labels.split(4096), strict=True)
    return torch.cat([(part @ weight + bias).argmax(-1) == expected for part, expected in pairs], dim=1)
