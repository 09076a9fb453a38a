"""The ``data`` section: shard sets, order of the images, loader threads, caches."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from PIL import ImageColor
from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from shards.credentials import strip_credentials
from shards.format.pixels import RGB, PixelFormat
from shards.storage.store import RetryPolicy
from streamtrain.config.section import (
    EXPANDED,
    VALUE_TYPE,
    Channels,
    NonNegative,
    PathOrUrl,
    PathText,
    Positive,
    Probability,
    Section,
    Size,
    accept,
    fixed,
    free,
)
from streamtrain.config.user_code import UserCode

# a smaller limit of width x height is meant in megapixels
MIN_PIXELS = 784


class SetShare(Section):
    """One of several shard sets that a run mixes."""

    shards: PathOrUrl = accept(..., "Folder or URL of the shard set.")
    weight: float = accept(
        ..., "Share of the images that come from this set, relative to the weights of the other sets.", gt=0.0,
        allow_inf_nan=False,
    )  # fmt: skip


def _form(value: Any) -> str | None:
    if isinstance(value, str):
        return "<one>"
    return "<several>" if isinstance(value, (list, tuple)) else None


# error messages omit a tag in angle brackets from the name of the key
ShardSets = Annotated[
    Annotated[str, EXPANDED, Tag("<one>")] | Annotated[tuple[SetShare, ...], Field(min_length=1), Tag("<several>")],
    Discriminator(
        _form,
        custom_error_type="shards",
        custom_error_message="give the path or the URL of a shard set, or a list of {shards: PATH, weight: NUMBER}",
    ),
    Field(json_schema_extra={VALUE_TYPE: "path, URL, or list of {shards, weight}"}),
]


class RemoteConfig(Section):
    """Retries of reads over the network. An object that stays unreadable stops the run."""

    deadline_seconds: float = free(
        300.0, "Time limit in seconds for a 4 MiB piece of an object, over all attempts.", gt=0.0
    )
    stall_seconds: float = free(30.0, "Time limit in seconds for one attempt, after which it is repeated.", gt=0.0)

    @property
    def retry_policy(self) -> RetryPolicy:
        return RetryPolicy(deadline_seconds=self.deadline_seconds, stall_seconds=self.stall_seconds)


class CacheConfig(Section):
    """Copies of remote shards on a local disk. Without a cache, each image is read over the network."""

    dir: PathText | None = free(
        None, "Folder of the copies, shared by the ranks of a machine and possibly by other runs; null: no cache."
    )
    limit: Size | None = free(None, "Maximum size of the folder.")
    downloads: Positive = free(4, "Shards that a rank downloads at the same time.")

    @model_validator(mode="after")
    def _reject_ineffective_keys(self) -> CacheConfig:
        if (self.dir is None) != (self.limit is None):
            raise ValueError("dir and limit must be set together")
        if self.dir is None and self.downloads != CacheConfig.model_fields["downloads"].default:
            raise ValueError("downloads has an effect only with dir")
        return self


class DataConfig(Section):
    """The images, their order and batches, and how they are read."""

    shards: ShardSets = accept(
        "", "Shard set to train on, or several with weights. On resume, the location may change. Other images (another "
        "digest of the set) need --accept data.shards.",
    )  # fmt: skip
    channels: Channels | None = fixed(
        None, "Channels of the images; null: from the manifest of a local set, otherwise 3. With 3 channels of uint8, "
        "all images are converted to RGB.",
    )  # fmt: skip
    dtype: Literal["uint8", "uint16", "float32"] | None = fixed(
        None, "Type of the stored values; null: from the manifest of a local set, otherwise uint8."
    )
    micro_batch: Positive = free(16, "Images per forward and backward pass on one rank.")
    global_batch: Positive | None = accept(
        None, "Images per optimizer step over all ranks, a multiple of micro_batch x ranks; null: micro_batch x ranks. "
        "On resume the resolved numbers are compared.",
    )  # fmt: skip
    window: Positive = fixed(16, "Shuffle window: number of consecutive (permuted) shards that are shuffled together.")
    lanes: Positive = fixed(
        64, "Number of independent streams an epoch is divided into; a rank reads only the shards of its own lanes."
    )
    max_unusable_share: Probability = free(
        0.01, "Stop the run when more than this share of the images had to be replaced (unreadable or undecodable)."
    )
    reader_threads: Positive = free(2, "Threads per rank that read images.")
    decode_threads: NonNegative = free(0, "Decoding threads per rank; 0: the rank's share of the available cores.")
    prefetch: Positive = free(2, "Batches prepared ahead of the step.")
    read_ahead_bytes: Size = free(256 * 2**20, "Maximum bytes of encoded images that a rank reads ahead.")
    max_pixels: int = accept(
        178_956_970, "Images with more pixels (width x height) are replaced without decoding them.", ge=MIN_PIXELS
    )
    background: str | tuple[int, int, int] | None = accept(
        "white", "Colour behind transparent images, in training, evaluation and pictures: a name, '#rrggbb' (in "
        "quotes) or [red, green, blue]; null: drop the alpha channel.",
    )  # fmt: skip
    augmentations: UserCode | None = accept(
        None, "Function of your own, applied to the finished training crops of each image (docs/training.md); null: "
        "none.",
    )  # fmt: skip
    cache: CacheConfig = CacheConfig()
    remote: RemoteConfig = RemoteConfig()

    @field_validator("background", mode="before")
    @classmethod
    def _check_background(cls, background: Any) -> Any:
        try:
            values = ImageColor.getrgb(background) if isinstance(background, str) else background
            is_color = values is None or (
                len(values) == 3 and all(type(value) is int and 0 <= value <= 255 for value in values)
            )
        except (TypeError, ValueError):
            is_color = False
        if not is_color:
            raise ValueError("must be a colour (white, #rrggbb or [red, green, blue] of 0 to 255) or null")
        return background

    @property
    def pixels(self) -> PixelFormat:
        """Channels and dtype of the images."""
        return PixelFormat(self.channels or RGB.channels, self.dtype or RGB.dtype)

    @property
    def background_color(self) -> tuple[int, int, int] | None:
        """The background as 8-bit red, green and blue."""
        if isinstance(self.background, str):
            red, green, blue, *_ = ImageColor.getrgb(self.background)
            return red, green, blue
        return self.background

    @property
    def shares(self) -> tuple[SetShare, ...]:
        """The shard sets with their weights; empty if ``shards`` is not set."""
        if isinstance(self.shards, str):
            return (SetShare(shards=self.shards, weight=1.0),) if self.shards else ()
        return self.shards

    @property
    def shards_text(self) -> str:
        """The shard sets in messages, without credentials: a path, or each path with its share of the images."""
        total = sum(share.weight for share in self.shares)
        if isinstance(self.shards, str):
            return strip_credentials(self.shards)
        return ", ".join(f"{share.weight / total:.1%} of {strip_credentials(share.shards)}" for share in self.shares)
