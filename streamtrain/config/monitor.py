"""What a run shows while it runs."""

from __future__ import annotations

from pydantic import Field

from streamtrain.config.section import NonNegative, Positive, Probability, Section, Weight


class CollapseConfig(Section):
    """When the teacher counts as collapsed; what is measured is described in ``watch/collapse.py``."""

    # steps between two looks; 0: never
    every: NonNegative = 20
    # step from which on it is judged; before, only what has been better already
    start: NonNegative = 1000
    # images looked at, of all ranks together
    images: Positive = 256
    # mean entropy of the assignments, in parts of that of the uniform one
    min_entropy: Probability = 0.01
    max_entropy: Probability = 0.99
    # prototypes that are the nearest of some image, in parts of the most that there can be
    min_usage: Probability = 0.05
    # effective rank of the features, in parts of the most that there can be
    min_rank: Probability = 0.05
    # standard deviation of the features; 1: that of directions drawn at random
    min_std: Weight = 0.1


class MonitorConfig(Section):
    """``monitor``: affects no result."""

    tensorboard: bool = True
    progress: bool = True
    # steps between two panels of crops and masks; 0: never
    panel_every: NonNegative = 500
    # samples a panel shows
    panel_samples: NonNegative = 4
    # a loss so many robust standard deviations above the median of so many steps before is warned of; window 0: never
    spike_score: float = Field(default=10.0, gt=0.0)
    spike_window: NonNegative = 200
    collapse: CollapseConfig = CollapseConfig()
