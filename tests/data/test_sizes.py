"""Crop sizes alternate in their shares, the same for everybody in a step."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamtrain.config.load import build, open_shard_set
from streamtrain.config.tree import Config
from streamtrain.data.loader import Loader
from streamtrain.data.sizes import SizeChoice
from streamtrain.errors import ConfigError


def config_of(shares: list[float], seed: int = 0) -> Config:
    entries = [{"share": share, "global_size": 32 * (index + 1)} for index, share in enumerate(shares)]
    return build({"run": {"seed": seed}, "crops": {"sizes": entries}})


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 2**40), st.integers(1, 64),
    st.integers(0, 10**9), st.integers(0, 2**31),
)
def test_each_size_is_seen_in_its_share_from_anywhere_on(
    shares: list[int], start: int, batch: int, seed: int, step: int
) -> None:
    config = config_of([float(share) for share in shares], seed)
    choice = SizeChoice(config, batch, start)
    first = start + step * batch
    seen = Counter(choice.of(first + index * batch) for index in range(200))
    for sizes, share in zip(config.crop_sizes, shares, strict=True):
        assert abs(seen[sizes] / 200 - share / sum(shares)) < 0.03
    # one choice within a step, whoever asks and wherever the run was resumed
    later = SizeChoice(config, batch, first)
    assert {choice.of(slot) for slot in range(first, first + batch)} == {later.of(first)}


def test_sizes_fill_in_from_the_section_and_are_checked() -> None:
    gram = {"objective": {"gram": {"weight": 1.0, "size": 64}}}
    entries = [{"share": 1, "local_size": 32}, {"share": 2, "global_size": 128, "gram_size": 96}]
    sizes = build({**gram, "crops": {"sizes": entries, "global_size": 64}}).crop_sizes
    assert [(size.global_size, size.local_size, size.gram_size) for size in sizes] == [(64, 32, 64), (128, 96, 96)]
    for crops, told in (
        ({"sizes": [{"share": 1, "local_size": 31}]}, "crops.sizes.0.local_size 31 is not a multiple"),
        ({"sizes": [{"share": 0}]}, "crops.sizes.0.share"),
        ({"sizes": [{"share": 1, "gram_size": 32}]}, "only with objective.gram.weight"),
    ):
        with pytest.raises(ConfigError, match=told):
            build({"crops": crops})
    with pytest.raises(ConfigError, match="in every entry or in none"):
        build({"crops": {"sizes": entries}, "objective": {"gram": {"weight": 1.0}}})


def test_the_loader_alternates_and_comes_back_to_the_same_pixels(config: Config, set_path: Path) -> None:
    raw = config.model_dump(mode="json")
    raw["crops"]["sizes"] = [
        {"share": 0.5, "gram_size": 96}, {"share": 0.5, "global_size": 32, "local_size": 16, "gram_size": 64},
    ]  # fmt: skip
    raw["objective"]["gram"]["weight"] = 1.0
    raw["data"]["global_batch"] = 8
    config = build(raw)
    shard_set = open_shard_set(config)

    def batches(rank: int, start_slot: int, count: int) -> list:
        with Loader(shard_set, config, rank=rank, world_size=1 + rank, device="cpu", start_slot=start_slot) as loader:
            return list(islice(loader, count))

    straight = batches(0, 0, 12)
    sides = [(batch.global_crops.shape[1], batch.local_crops.shape[1], batch.gram_crops.shape[1]) for batch in straight]
    # two micro-batches a step
    assert sides[::2] == sides[1::2] and set(sides) == {(64, 32, 96), (32, 16, 64)}
    for batch in straight:
        assert batch.gram_crops.shape[0] == batch.global_crops.shape[0]
        assert batch.masks.grid_mask.shape[1] == (batch.global_crops.shape[1] // 16) ** 2
    resumed, second_rank = batches(0, 24, 6), batches(1, 24, 3)
    pairs = [*zip(resumed, straight[6:], strict=True), *zip(second_rank, straight[7::2], strict=True)]
    for ours, theirs in pairs:
        assert all(torch.equal(a, b) for a, b in zip(ours.tensors(), theirs.tensors(), strict=True))
