"""Counter-based random draws: every number is a pure function of (seed, purpose, counters).

All randomness of a run comes from this module, so a sample looks the same on any number of ranks, on any worker and
after any resume. Only raw Philox words are used: numpy guarantees their stream, but not that of ``Generator`` methods
such as ``permutation``, so an order saved under one numpy version is the same under the next.

A purpose is a short string, one per kind of draw, so that no two kinds share random numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np

ORDER_SHARDS = "order/shards"  # permutation of the shards; counter: epoch
ORDER_WINDOW = "order/block"  # shuffle within one window; counters: epoch, lane, window
SUBSTITUTE = "order/substitute"  # replacement of an unusable sample; counters: slot, attempt
MIXTURE = "order/mixture"  # seed of each member of a mixture; counter: member
PACKING = "pack/shuffle"  # order in which images are packed
VIEWS = "data/views"  # crop boxes, flips, colour, blur, solarize; counter: slot
WINDOWS = "data/windows"  # window of a large image that all views of a sample come from; counter: slot
TURNS = "data/turns"  # vertical flips and quarter turns of the views; counter: slot
PERTURBATIONS = "data/perturbations"  # brightness, contrast, noise, dropped channels of the views; counter: slot
MASKS = "data/masks"  # rectangles of the block masks; counter: slot
MASK_GROUPS = "data/mask_groups"  # which crops of a group are masked, and how much; counter: group
AUGMENTATIONS = "data/augmentations"  # the user's function; counters: slot, 1 for local crops and 0 for global ones
SIZES = "data/sizes"  # start of the alternation of crop sizes; no counter
MODEL = "model/step"  # drop-path and RoPE rescale; counter: first slot of the micro-batch
INITIALISE = "model/initialise"  # initial parameters; counter: derived from the parameter's name

_WORD = (1 << 64) - 1
_TO_UNIT = 2.0**-53


def _philox(seed: int, purpose: str, counters: tuple[int, ...]) -> np.random.Philox:
    """Return a separate Philox stream: ``counters`` fill the upper three words, draws advance the lowest."""
    assert len(counters) <= 3, "Philox has room for three counters"
    purpose_word = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
    key = np.array([seed & _WORD, purpose_word], dtype=np.uint64)
    words = np.zeros(4, dtype=np.uint64)
    words[1 : 1 + len(counters)] = [counter & _WORD for counter in counters]
    return np.random.Philox(key=key, counter=words)


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """Return a numpy generator that depends only on (seed, purpose, counters); at most three counters.

    Raw words and ``random()`` are stable across numpy versions; other distributions may not be.
    """
    return np.random.Generator(_philox(seed, purpose, counters))


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """Return a seed in [0, 2^63) for another library's generator, such as ``torch.Generator.manual_seed``."""
    return int(_philox(seed, purpose, counters).random_raw()) >> 1


def uniforms(seed: int, purpose: str, slots: np.ndarray, count: int) -> np.ndarray:
    """Return uniform draws in [0, 1), float64 [num_slots, count]; row i depends only on (seed, purpose, slots[i]).

    Args:
        slots: int64 [num_slots], non-negative.
        count: draws per slot; a larger count leaves the first columns unchanged.
    """
    slots = np.asarray(slots, dtype=np.int64)
    raw = np.empty((len(slots), count), dtype=np.uint64)
    stream = _philox(seed, purpose, ())
    # Resetting one stream for each slot costs a third of building a Philox per slot.
    state = stream.state
    counter = np.zeros(4, dtype=np.uint64)
    state["state"]["counter"] = counter
    state["buffer_pos"] = 4
    for row, slot in enumerate(slots):
        counter[1] = slot
        stream.state = state
        raw[row] = stream.random_raw(count)
    return (raw >> np.uint64(11)) * _TO_UNIT


def permutation(seed: int, purpose: str, length: int, *counters: int) -> np.ndarray:
    """Return a uniform permutation of range(length), int64 [length], for length up to 2^32.

    Sorts random words whose low bits hold the index: faster than an argsort, and free of ties.
    """
    assert length <= 1 << 32, "permutations are limited to 2^32 entries"
    low = np.uint64((1 << max(length - 1, 0).bit_length()) - 1)
    words = _philox(seed, purpose, counters).random_raw(length)
    words = (words & ~low) | np.arange(length, dtype=np.uint64)
    words.sort()
    return (words & low).astype(np.int64)
