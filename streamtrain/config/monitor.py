"""What a run shows while it runs."""

from __future__ import annotations

from streamtrain.config.section import NonNegative, Section


class MonitorConfig(Section):
    """``monitor``: affects no result."""

    tensorboard: bool = True
    progress: bool = True
    # steps between two panels of crops and masks; 0: never
    panel_every: NonNegative = 500
    # samples a panel shows
    panel_samples: NonNegative = 4
