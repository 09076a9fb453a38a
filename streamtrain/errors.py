"""Errors that a user can fix; commands print them as one line without a traceback."""

from __future__ import annotations

from shards.errors import printable


class StreamtrainError(ValueError):
    """An error in the input, the configuration or the run directory; the message is one line."""

    def __init__(self, message: str) -> None:
        # messages quote file names and values
        super().__init__(printable(message))


class ConfigError(StreamtrainError):
    """An invalid configuration; the message names the key and the valid values."""


class CheckpointError(StreamtrainError):
    """A checkpoint that is missing, damaged, or does not fit the run."""


class DivergedError(StreamtrainError):
    """Training has diverged: losses, gradients or weights are not finite."""


class TrainingError(StreamtrainError):
    """``streamtrain.train`` failed or was stopped early; the message is the last error line of the run."""


class UserCodeError(StreamtrainError):
    """A function or class of the user's own failed; ``__cause__`` is its exception, if it raised one."""
