"""Errors of the data layer that the user can fix."""

from __future__ import annotations


class ShardError(ValueError):
    """An image, shard, index or manifest is missing or damaged; the message is one line with the remedy."""

    def __init__(self, message: str) -> None:
        # messages quote file names and values, which may contain line breaks
        super().__init__(" ".join(message.splitlines()))


class SampleError(ShardError):
    """One image of a set is unusable.

    Attributes:
        shard: file name of the tar.
        index: number of the sample in the tar.
        key: WebDataset key of the sample.
        reason: why it is unusable.
    """

    def __init__(self, shard: str, index: int, key: str, reason: str) -> None:
        super().__init__(f"shard {shard}, sample {index} (key {key!r}): {reason}")
        self.shard, self.index, self.key, self.reason = shard, index, key, reason
