"""The stream: which shard set, in which order, with how many threads."""

from __future__ import annotations

from streamtrain.config.section import NonNegative, Positive, Probability, Section


class DataConfig(Section):
    """``data``: the first block decides what is seen, the second only how fast."""

    # affects results
    shards: str = ""
    micro_batch: Positive = 16
    # samples of one optimiser step over all ranks; null: micro_batch x world size
    global_batch: Positive | None = None
    # shuffle window: so many consecutive (permuted) shards are shuffled together
    window: Positive = 16
    # canonical streams an epoch is cut into; a rank reads the shards of its own lanes only
    lanes: Positive = 64

    # share of images that may be unreadable or undecodable, and replaced, before the run stops
    max_unusable_share: Probability = 0.01

    # affects speed and memory only
    reader_threads: Positive = 2
    # DALI's own threads; 0: the cores of this machine divided by its ranks
    decode_threads: NonNegative = 0
    # batches prepared ahead of the step
    prefetch: Positive = 2
    read_ahead_bytes: Positive = 256 * 2**20
    # an image with more pixels is refused before it is decoded
    max_pixels: Positive = 178_956_970
