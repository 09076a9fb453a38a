"""The user's own augmentation (``data.augmentations``), called with the crops of one sample at a time.

It gets a generator that depends only on the seed and the slot, so that its results depend neither on the batch, nor on
the number of ranks, nor on the step at which a run was resumed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from shards.randomness import AUGMENTATIONS, derive_seed
from streamtrain.config.user_code import AUGMENTATION_ARGUMENTS, describe_failure, load_user_code
from streamtrain.errors import UserCodeError

KEY = "data.augmentations"
# calls at the start that are repeated, to find a function that draws from another generator or keeps a state
_NUM_REPEATED = 16


class UserAugmentation:
    """The function of ``data.augmentations``; several threads may call it at the same time."""

    def __init__(self, reference: str, seed: int) -> None:
        """Import the function.

        Raises:
            UserCodeError: if there is no such function.
        """
        self._what, self._seed = f"{KEY}={reference}", seed
        self._function = load_user_code(KEY, reference, AUGMENTATION_ARGUMENTS)
        self._calls = itertools.count()

    def __call__(self, crops: Tensor, slot: int, is_local: bool) -> Tensor:
        """Return the augmented crops of one sample, uint8 [views, 3, H, W]; they may share memory with ``crops``.

        Raises:
            UserCodeError: if the function fails, returns something else, or is not deterministic.
        """
        is_repeated = next(self._calls) < _NUM_REPEATED
        before = crops.clone() if is_repeated else crops
        result = self._call(crops, slot, is_local)
        if is_repeated and not torch.equal(result, self._call(before, slot, is_local)):
            raise UserCodeError(
                f"{self._what} returns other pixels when it is called again for slot {slot}; draw random numbers from "
                "generator only, and keep no state between calls"
            )
        return result

    def augment_batch(self, crops: Tensor, slots: Sequence[int], is_local: bool) -> None:
        """Replace the crops uint8 [views * B, H, W, 3] (view-major) of ``slots`` in place."""
        for row, slot in enumerate(slots):
            views = crops[row :: len(slots)]
            if len(views):
                planes = views.permute(0, 3, 1, 2).contiguous()
                views.copy_(self(planes, slot, is_local).permute(0, 2, 3, 1))

    def _call(self, crops: Tensor, slot: int, is_local: bool) -> Tensor:
        shape = tuple(crops.shape)
        generator = torch.Generator().manual_seed(derive_seed(self._seed, AUGMENTATIONS, slot, is_local))
        try:
            with torch.no_grad():
                result = self._function(crops, generator)
        except (Exception, SystemExit) as error:
            raise UserCodeError(
                f"{self._what} failed for slot {slot}: {describe_failure(error, self._function)}"
            ) from error
        wanted = f"uint8 {list(shape)} on {crops.device}"
        if not isinstance(result, Tensor):
            raise UserCodeError(f"{self._what} must return crops, {wanted}, not {type(result).__name__} (slot {slot})")
        given = f"{str(result.dtype).removeprefix('torch.')} {list(result.shape)} on {result.device}"
        if given != wanted:
            raise UserCodeError(f"{self._what} must return {wanted}, the shape of its crops, not {given} (slot {slot})")
        return result
