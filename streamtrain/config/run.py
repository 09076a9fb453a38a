"""Where a run lives, how long it is, and which checkpoints it keeps."""

from __future__ import annotations

from streamtrain.config.section import NonNegative, Positive, PositiveSteps, Section, Steps


class RunConfig(Section):
    """``run``: affects results only through ``seed`` and ``steps`` (schedules end at ``steps``)."""

    dir: str = "runs/default"
    steps: PositiveSteps = 1000
    seed: NonNegative = 0
    # checkpoints; 0 means never
    checkpoint_every: Steps = 500
    # the newest so many stay; 0 keeps all
    keep_last: NonNegative = 2
    # beyond those, every checkpoint whose step is a multiple of this stays; 0 keeps none
    keep_every: Steps = 0
    # the teacher's weights alone, in snapshots/, all of which stay; 0 means never
    snapshot_every: Steps = 0
    # write them beside the training, from a copy in host memory where there is room for one
    save_in_background: bool = True
    # steps in a row whose loss or gradient is not finite, and which change nothing, before the run stops
    max_bad_steps: Positive = 10
