"""The stream: which shard set, in which order, with how many threads."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from shards.storage.store import RetryPolicy
from streamtrain.config.section import NonNegative, Positive, Probability, Section, Size, branch


class SetShare(Section):
    """One of several shard sets that a stream mixes."""

    # a folder, or a URL of one
    shards: str = Field(min_length=1)
    # of the stream, relative to the weights of the other sets
    weight: float = Field(gt=0.0, allow_inf_nan=False)


def _form(value: Any) -> str | None:
    forms = {str: branch("one"), list: branch("several"), tuple: branch("several")}
    return next((form for kind, form in forms.items() if isinstance(value, kind)), None)


ShardSets = Annotated[
    Annotated[str, Tag(branch("one"))]
    | Annotated[tuple[SetShare, ...], Field(min_length=1), Tag(branch("several"))],
    Discriminator(
        _form,
        custom_error_type="shards",
        custom_error_message="give the path or the URL of a shard set, or a list of {shards: PATH, weight: NUMBER}",
    ),
]


class RemoteConfig(Section):
    """``data.remote``: how long to try before an object behind a URL counts as lost, which stops the run."""

    # for one piece (4 MiB) of an object, all attempts together
    deadline_seconds: float = Field(default=300.0, gt=0.0)
    # for one attempt
    stall_seconds: float = Field(default=30.0, gt=0.0)

    @property
    def retry_policy(self) -> RetryPolicy:
        """The same for a store."""
        return RetryPolicy(deadline_seconds=self.deadline_seconds, stall_seconds=self.stall_seconds)


class CacheConfig(Section):
    """``data.cache``: copies of remote shards on a local disk; without it, each image is read over the network."""

    # a folder, which the ranks of a machine share, and other runs may share too; null: no copies
    dir: str | None = None
    # bytes that the folder never exceeds, such as 200GB
    limit: Size | None = None
    # shards that a rank fetches at a time
    downloads: Positive = 4

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> CacheConfig:
        if (self.dir is None) != (self.limit is None):
            raise ValueError("dir and limit need each other")
        if self.dir is None and self.downloads != CacheConfig.model_fields["downloads"].default:
            raise ValueError("downloads has an effect only with dir")
        return self


class DataConfig(Section):
    """``data``: the first block decides what is seen, the second only how fast."""

    # affects results
    # the path or URL of a shard set; or several with their weights: [{shards: A, weight: 3}, {shards: B, weight: 1}]
    shards: ShardSets = ""
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
    cache: CacheConfig = CacheConfig()
    remote: RemoteConfig = RemoteConfig()

    @property
    def shares(self) -> tuple[SetShare, ...]:
        """The shard sets with their weights; none where ``shards`` is empty."""
        if isinstance(self.shards, str):
            return (SetShare(shards=self.shards, weight=1.0),) if self.shards else ()
        return self.shards

    @property
    def shards_text(self) -> str:
        """Which shard sets, for people: a path, or each path with its share of the stream."""
        total = sum(share.weight for share in self.shares)
        if isinstance(self.shards, str):
            return self.shards
        return ", ".join(f"{share.weight / total:.1%} of {share.shards}" for share in self.shares)
