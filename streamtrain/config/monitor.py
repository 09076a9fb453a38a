"""The ``monitor`` section: metrics, pictures, profiles, warnings."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from streamtrain.config.section import NonNegative, Positive, Probability, Section, Weight, free


class CollapseConfig(Section):
    """Warnings of a collapsed teacher. ``streamtrain/diagnostics/collapse.py`` describes the metrics."""

    every: NonNegative = free(20, "Steps between measurements; 0: never.")
    start: NonNegative = free(
        1000, "First step at which any metric can cause a warning; earlier, only a metric that has been in range can."
    )
    images: Positive = free(256, "Images per measurement, over all ranks.")
    min_entropy: Probability = free(0.01, "Lower limit of the assignments' mean entropy as a share of its maximum.")
    max_entropy: Probability = free(0.99, "Upper limit of the assignments' mean entropy as a share of its maximum.")
    min_usage: Probability = free(
        0.05, "Lower limit of the number of prototypes that are nearest to some image, as a share of its maximum."
    )
    min_rank: Probability = free(0.05, "Lower limit of the effective rank of the features as a share of its maximum.")
    min_std: Weight = free(
        0.1, "Lower limit of the standard deviation of the features, where random directions have 1."
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
        500, "Steps between panels of crops and masks, and between feature maps of held-out images; both are drawn at "
        "the start and at the last step, too; 0: never."
    )  # fmt: skip
    panel_samples: NonNegative = free(4, "Number of images in a panel, and of held-out images with feature maps.")
    panel_channels: tuple[NonNegative, ...] | None = free(
        None,
        "Channels (from 0) that pictures show as red, green and blue, or one as grey; null: the first three, or "
        "the first of fewer.",
    )
    histogram_every: NonNegative = free(1000, "Steps between histograms of weights and gradients; 0: never.")
    peak_flops: float | None = free(
        None, "Peak FLOP/s of one device, such as 989e12, for the model FLOPs utilization; null: looked up by the "
        "device's name.", gt=0.0,
    )  # fmt: skip
    profile: ProfileConfig = ProfileConfig()
    spike_score: float = free(
        10.0,
        "Warn when the loss exceeds the median of the preceding steps by more than this many robust standard "
        "deviations.",
        gt=0.0,
    )
    spike_window: NonNegative = free(200, "Number of preceding steps that the loss is compared with; 0: no warning.")
    collapse: CollapseConfig = CollapseConfig()
