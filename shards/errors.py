"""The one error of the data floor that a user can mend."""

from __future__ import annotations


class ShardError(ValueError):
    """Images, shards, an index or a manifest are at fault; the message is one line that says what to do."""

    def __init__(self, message: str) -> None:
        # names and values from anywhere may be part of it
        super().__init__(" ".join(message.splitlines()))


class SampleError(ShardError):
    """One image of a set cannot be used.

    Attributes:
        shard: the name of the tar.
        index: the sample's number in it.
        key: its WebDataset key.
        reason: what is wrong with it.
    """

    def __init__(self, shard: str, index: int, key: str, reason: str) -> None:
        super().__init__(f"shard {shard}, sample {index} (key {key!r}): {reason}")
        self.shard, self.index, self.key, self.reason = shard, index, key, reason
