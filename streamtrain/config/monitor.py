"""The ``monitor`` section: metrics, pictures, profiles, warnings."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from streamtrain.config.section import NonNegative, Positive, Probability, Section, Weight, free


class CollapseConfig(Section):
    """Warnings of a collapsed teacher. ``streamtrain/diagnostics/collapse.py`` describes the metrics."""

    every: NonNegative = free(20, "Steps between two measurements; 0: never.")
    start: NonNegative = free(
        1000, "First step at which every metric can cause a warning; before, only a metric that has been in range."
    )
    images: Positive = free(256, "Images of a measurement, over all ranks.")
    min_entropy: Probability = free(0.01, "Lower limit of the mean entropy of the assignments / its maximum.")
    max_entropy: Probability = free(0.99, "Upper limit of the mean entropy of the assignments / its maximum.")
    min_usage: Probability = free(
        0.05, "Lower limit of the number of prototypes nearest to an image / its maximum."
    )
    min_rank: Probability = free(0.05, "Lower limit of the effective rank of the features / its maximum.")
    min_std: Weight = free(
        0.1, "Lower limit of the standard deviation of the features, where 1 is that of random directions."
    )


class ProfileConfig(Section):
    """A torch.profiler trace of some steps, one file per rank in RUN/profile, for ui.perfetto.dev."""

    start: Positive | None = free(None, "First step of the trace, from 1; null: no trace.")
    steps: Positive = free(3, "Number of steps in the trace.")

    @model_validator(mode="after")
    def _reject_ineffective_keys(self) -> ProfileConfig:
        if self.start is None and self.steps != ProfileConfig.model_fields["steps"].default:
            raise ValueError("steps has an effect only with start")
        return self


class MonitorConfig(Section):
    """Metrics, pictures and warnings; affects no result."""

    tensorboard: bool = free(True, "Write TensorBoard files to RUN/tensorboard.")
    progress: bool = free(True, "Show a progress bar on the terminal.")
    trackers: tuple[Literal["wandb", "mlflow"], ...] = free(
        (), "Experiment trackers that also receive the metrics; their packages must be installed."
    )
    project: str = free("streamtrain", "Name of the project (wandb) or the experiment (mlflow).")
    panel_every: NonNegative = free(
        500, "Steps between two panels of crops and masks, and two feature maps of held-out images; 0: never."
    )
    panel_samples: NonNegative = free(4, "Images in a panel, and held-out images with feature maps.")
    histogram_every: NonNegative = free(1000, "Steps between two histograms of weights and gradients; 0: never.")
    peak_flops: float | None = free(
        None, "Peak FLOP/s of one device, such as 989e12, for the model FLOPs utilization; null: looked up by the "
        "device's name.", gt=0.0,
    )  # fmt: skip
    profile: ProfileConfig = ProfileConfig()
    spike_score: float = free(
        10.0, "Warn when the loss exceeds the median of the steps before by more robust standard deviations.", gt=0.0
    )
    spike_window: NonNegative = free(200, "Number of steps before that the loss is compared with; 0: no warning.")
    collapse: CollapseConfig = CollapseConfig()
