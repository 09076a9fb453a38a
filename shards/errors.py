"""The one error of the data floor that a user can mend."""

from __future__ import annotations


class ShardError(ValueError):
    """Something is wrong with images, shards, an index or a manifest; the message is one line that says what to do."""
