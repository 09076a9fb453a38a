"""Logistic regression on frozen features with scikit-learn; the problem is convex, so no schedule needs tuning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from shards.randomness import permutation
from streamtrain.errors import StreamtrainError

# inverse regularisation strengths, scikit-learn's C
PENALTIES = tuple(10.0 ** (exponent / 2) for exponent in range(-10, 5))
HELD_OUT_SHARE = 0.1
_PURPOSE = "evaluation/logistic"


@dataclass(frozen=True)
class LogisticResult:
    """Test accuracy with the penalty (C) that has the highest accuracy on held-out training data."""

    accuracy: float
    penalty: float
    # bool [M]: which test images are predicted correctly
    is_right: np.ndarray = field(repr=False, compare=False)


def require_scikit_learn() -> None:
    """Raise StreamtrainError if scikit-learn is not installed."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError:
        raise StreamtrainError('evaluate logistic needs scikit-learn: pip install "streamtrain[eval]"') from None


def logistic_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    penalties: Sequence[float] = PENALTIES,
    report: Callable[[int], object] | None = None,
) -> LogisticResult:
    """Fit L2-regularised multinomial regression on standardised features and return its test accuracy.

    The penalty is chosen on a held-out tenth of the training data; the final fit uses all training data.

    Args:
        train_features, test_features: fp32 [N, D], [M, D]; standardised by the mean and deviation of the former.
        train_labels, test_labels: int64 [N], [M].
        penalties: values of C to try, each fit starting from the next smaller one's result.
        report: called after each of the ``len(penalties) + 1`` fits with the number of completed ones.

    Raises:
        StreamtrainError: if scikit-learn is not installed, or the training data has a single class.
    """
    require_scikit_learn()
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, deviation = train_features.mean(0), train_features.std(0).clamp_min(1e-6)
    train, test = (((part - mean) / deviation).double().cpu().numpy() for part in (train_features, test_features))
    labels, test_labels_array = train_labels.cpu().numpy(), test_labels.cpu().numpy()
    order = permutation(0, _PURPOSE, len(train), 0)
    num_held = max(int(len(train) * HELD_OUT_SHARE), 1)
    held, kept = order[:num_held], order[num_held:]
    if len(np.unique(labels[kept])) < 2:
        raise StreamtrainError("logistic regression needs training images of at least two classes")
    scores = []
    regression = LogisticRegression(warm_start=True, max_iter=1000)
    with warnings.catch_warnings():
        # nearly separable data with little regularisation converges slowly; the accuracy is final long before
        warnings.simplefilter("ignore", ConvergenceWarning)
        for index, penalty in enumerate(sorted(penalties)):
            regression.set_params(C=penalty).fit(train[kept], labels[kept])
            scores.append(regression.score(train[held], labels[held]))
            if report is not None:
                report(index + 1)
        best = sorted(penalties)[int(np.argmax(scores))]
        regression = LogisticRegression(C=best, max_iter=1000).fit(train, labels)
    if report is not None:
        report(len(penalties) + 1)
    is_right = regression.predict(test) == test_labels_array
    return LogisticResult(float(is_right.mean()), best, is_right)
