"""Errors a user can mend; command lines print them as one line and no traceback."""

from __future__ import annotations


class StreamtrainError(ValueError):
    """Something in the input, the configuration or the run folder that the user can put right; told in one line."""

    def __init__(self, message: str) -> None:
        # names and values from anywhere may be part of it
        super().__init__(" ".join(message.splitlines()))


class ConfigError(StreamtrainError):
    """A configuration that cannot be used: the message names the key and what would be right."""


class CheckpointError(StreamtrainError):
    """A checkpoint that is missing, damaged or belongs to another run."""


class DivergedError(StreamtrainError):
    """Training has come to numbers that are not finite, and going on would be of no use."""


class TrainingError(StreamtrainError):
    """``streamtrain.train`` failed or was stopped early; the message is the last error line of the run."""
