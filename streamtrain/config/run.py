"""The ``run`` section: run directory, length, seed, checkpoints."""

from __future__ import annotations

from streamtrain.config.section import NonNegative, PathText, Positive, PositiveSteps, Section, Steps, fixed, free


class RunConfig(Section):
    """Run directory, length, seed and checkpoints; only ``seed`` and ``steps`` affect results."""

    dir: PathText = free("runs/default", "Run directory: resolved config, checkpoints, metrics and logs.")
    steps: PositiveSteps = free(1000, "Length of the run in optimizer steps; schedules end at this step.")
    seed: NonNegative = fixed(0, "Seed of initial weights, image order, augmentations, masks and drop-path.")
    checkpoint_every: Steps = free(500, "Steps between checkpoints; 0: only at the end of the run or on a stop.")
    keep_last: NonNegative = free(2, "Number of latest checkpoints to keep; 0 keeps all.")
    keep_every: Steps = free(0, "Also keep each checkpoint whose step is a multiple of this; 0: none.")
    snapshot_every: Steps = free(
        0, "Steps between snapshots (the teacher's weights alone, in snapshots/, never deleted); 0: none."
    )
    save_in_background: bool = free(True, "Write checkpoints in the background, from a copy in host memory if it fits.")
    max_bad_steps: Positive = free(
        10, "Number of consecutive steps with a non-finite loss or gradient (no update) after which the run stops."
    )
