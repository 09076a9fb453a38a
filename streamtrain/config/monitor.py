"""What a run shows while it runs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

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


class ProfileConfig(Section):
    """``monitor.profile``: a trace of some steps in RUN/profile, one file a rank, for ui.perfetto.dev."""

    # the first step that is traced, from 1; null: none
    start: Positive | None = None
    steps: Positive = 3

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> ProfileConfig:
        if self.start is None and self.steps != ProfileConfig.model_fields["steps"].default:
            raise ValueError("steps has an effect only with start")
        return self


class MonitorConfig(Section):
    """``monitor``: affects no result."""

    tensorboard: bool = True
    progress: bool = True
    # further places to report to; the library of each must be installed
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    # what trackers call the project (wandb) or the experiment (mlflow)
    project: str = "streamtrain"
    # steps between two panels of crops and masks, and two maps of held-out images; 0: never
    panel_every: NonNegative = 500
    # samples that a panel shows, and held-out images of the maps
    panel_samples: NonNegative = 4
    # steps between two histograms of weights and gradients; 0: never
    histogram_every: NonNegative = 1000
    # operations a second that one device can do at most, such as 989e12; null: from a table, by the device's name
    peak_flops: float | None = Field(default=None, gt=0.0)
    profile: ProfileConfig = ProfileConfig()
    # a loss so many robust standard deviations above the median of so many steps before is warned of; window 0: never
    spike_score: float = Field(default=10.0, gt=0.0)
    spike_window: NonNegative = 200
    collapse: CollapseConfig = CollapseConfig()
