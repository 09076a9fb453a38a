"""Errors of the data layer that the user can fix."""

from __future__ import annotations

import errno

from shards.credentials import strip_from_text

# errors of a read that concern the bytes at one offset, or one path; see is_source_failure
_FAILURES_OF_ONE_FILE = frozenset(
    (
        *(errno.EIO, errno.EBADMSG, errno.EILSEQ, errno.EINVAL, errno.EOVERFLOW),
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO),
        # Linux: medium errors of a disk, and blocks of a file system with a wrong checksum
        *(getattr(errno, name) for name in ("ENODATA", "EREMOTEIO", "EUCLEAN") if hasattr(errno, name)),
    )
)


def is_source_failure(error: OSError) -> bool:
    """Return whether a failed read concerns the process or the whole file system, not the bytes of one image.

    Such an error (ESTALE, ENOTCONN, ETIMEDOUT, EMFILE, ENFILE, ENOMEM, EACCES, ...) says nothing about the image: the
    read is retried briefly, then the command ends with one line and can be resumed. The image is never skipped or
    quarantined. All other errors (EIO, ENOENT, an error of a decoder without a number, ...) are those of one file or of
    the bytes at one offset; a reader that finds a file of many images missing must treat that as a failure itself.
    """
    return error.errno is not None and error.errno not in _FAILURES_OF_ONE_FILE


def read_remedy(error: OSError, otherwise: str) -> str:
    """Return the remedy for a failed read; ``otherwise`` applies if the file itself is missing or damaged."""
    return "fix that and re-run to resume" if is_source_failure(error) else otherwise


def explain_os_error(error: OSError) -> str:
    """Return the reason for an ``OSError`` as text, with the remedy for a lack of file descriptors."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno == errno.EMFILE:
        return f"{reason}; raise the limit of this process with ulimit -n"
    if error.errno == errno.ENFILE:
        return f"{reason} on this machine; raise the kernel's limit fs.file-max"
    return reason


def printable(text: object) -> str:
    """Return text as one line that is safe to print: control characters and undecodable bytes are escaped, and URLs
    have no credentials.

    File names and keys come from untrusted archives. They may contain terminal codes, line breaks or bytes that are not
    UTF-8.
    """
    one_line = strip_from_text(" ".join(str(text).splitlines()))
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


class SourceUnreachable(ShardError):
    """The source cannot be reached: the command ends, because skipping the image would change its result."""


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
