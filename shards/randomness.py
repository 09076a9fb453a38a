"""Counter-based random draws: every number is a pure function of (seed, purpose, counters).

All randomness of a run comes from here, so that a sample looks the same on any number of ranks, on any worker
and after any resume. Only raw Philox words are used (numpy guarantees their stream for ever; it does not for
``Generator`` methods such as ``permutation``), so an order saved under one numpy is the order under the next.

A purpose is a short string, one per kind of draw, so that no two kinds share numbers. The ones in use are
named below.
"""

from __future__ import annotations

import hashlib

import numpy as np

ORDER_SHARDS = "order/shards"  # the permutation of the shards; counter: epoch
ORDER_BLOCK = "order/block"  # the shuffle of one block of samples; counters: epoch, lane, block
SUBSTITUTE = "order/substitute"  # who stands in for an unusable sample; counters: slot, attempt
MIXTURE = "order/mixture"  # where the members of a mixture stand in its cycle; counter: cycle
PACKING = "pack/shuffle"  # the order in which images are packed
VIEWS = "data/views"  # crop boxes, flips, colour, blur, solarize; counter: slot
MASKS = "data/masks"  # the rectangles of the block masks; counter: slot
MASK_GROUPS = "data/mask_groups"  # which crops of a group are masked, and how much; counter: group
SIZES = "data/sizes"  # where the alternation of crop sizes starts; no counter
MODEL = "model/step"  # drop-path and RoPE rescale; counter: first slot of the micro-batch
INITIALISE = "model/initialise"  # initial parameters; counter: from the parameter's name

_WORD = (1 << 64) - 1
_TO_UNIT = 2.0**-53


def _key(seed: int, purpose: str) -> np.ndarray:
    """The Philox key [2] of a seed (taken modulo 2^64) and a purpose."""
    word = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
    return np.array([seed & _WORD, word], dtype=np.uint64)


def _philox(seed: int, purpose: str, counters: tuple[int, ...]) -> np.random.Philox:
    """A Philox stream of its own: the counters fill the upper three words, draws count in the lowest."""
    assert len(counters) <= 3, "Philox has room for three counters"
    words = np.zeros(4, dtype=np.uint64)
    words[1 : 1 + len(counters)] = [counter & _WORD for counter in counters]
    return np.random.Philox(key=_key(seed, purpose), counter=words)


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A numpy generator that depends on (seed, purpose, counters) only; at most three counters.

    Its raw words and ``random()`` are stable across numpy versions; other distributions need not be.
    """
    return np.random.Generator(_philox(seed, purpose, counters))


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """A seed in [0, 2^63) for another library's generator, such as ``torch.Generator.manual_seed``."""
    return int(_philox(seed, purpose, counters).random_raw()) >> 1


def uniforms(seed: int, purpose: str, slots: np.ndarray, count: int) -> np.ndarray:
    """Uniform draws in [0, 1), float64 [num_slots, count]; row i depends on (seed, purpose, slots[i]) only.

    Args:
        slots: int64 [num_slots], non-negative.
        count: draws a slot; the first columns do not change when it grows.
    """
    slots = np.asarray(slots, dtype=np.int64)
    raw = np.empty((len(slots), count), dtype=np.uint64)
    stream = _philox(seed, purpose, ())
    # Moving one stream from slot to slot costs a third of building a Philox for each.
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
    """A uniform permutation of range(length), int64 [length], for length up to 2^32.

    Sorts random words whose low bits hold the index: faster than an argsort, and free of ties.
    """
    assert length <= 1 << 32, "a block of more than 2^32 samples"
    low = np.uint64((1 << max(length - 1, 0).bit_length()) - 1)
    words = _philox(seed, purpose, counters).random_raw(length)
    words = (words & ~low) | np.arange(length, dtype=np.uint64)
    words.sort()
    return (words & low).astype(np.int64)
