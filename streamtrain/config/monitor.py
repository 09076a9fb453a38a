"""What a run shows while it runs."""

from __future__ import annotations

from pydantic import Field

from streamtrain.config.section import NonNegative, Section


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
