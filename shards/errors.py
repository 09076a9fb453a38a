"""Errors of the data layer that the user can fix."""

from __future__ import annotations


def printable(text: object) -> str:
    """Return text as one line that is safe to print: control characters and undecodable bytes are escaped.

    File names and keys come from untrusted archives. They may contain terminal codes, line breaks or bytes that are not
    UTF-8.
    """
    one_line = " ".join(str(text).splitlines())
    if one_line.isprintable():
        return one_line
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in one_line)


def printable_lines(text: object) -> str:
    """Return text of several lines, each made safe to print as by ``printable``."""
    return "\n".join(printable(line) for line in str(text).split("\n"))


class ShardError(ValueError):
    """An image, shard, index or manifest is missing or damaged; the message is one line with the remedy."""

    def __init__(self, message: str) -> None:
        # messages quote file names and values
        super().__init__(printable(message))


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
