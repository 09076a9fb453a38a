"""Which of several crop sizes a step has."""

from __future__ import annotations

from itertools import accumulate

from shards.randomness import SIZES, generator
from streamtrain.config.crops import CropSizes
from streamtrain.config.tree import Config

# its multiples fall into every interval of [0, 1) in proportion to its length, as evenly as any number's do
_GOLDEN = 0.6180339887498949


class SizeChoice:
    """The sizes of any step, from its slots alone: the same on all ranks and in all its micro-batches."""

    def __init__(self, config: Config, global_batch: int, start_slot: int) -> None:
        """``start_slot``: the first slot of any step, from which the others start at multiples of the batch."""
        self._sizes = config.crop_sizes
        self._global_batch, self._offset = global_batch, start_slot % global_batch
        shares = [entry.share for entry in config.crops.sizes]
        self._bounds = [bound / sum(shares) for bound in accumulate(shares)]
        self._start = float(generator(config.run.seed, SIZES).random())

    def of(self, slot: int) -> CropSizes:
        """The sizes of the step that ``slot`` is in."""
        if len(self._sizes) == 1:
            return self._sizes[0]
        position = (self._start + (slot - self._offset) // self._global_batch * _GOLDEN) % 1.0
        # rounding may leave the last bound a little below 1
        index = sum(position >= bound for bound in self._bounds[:-1])
        return self._sizes[index]
