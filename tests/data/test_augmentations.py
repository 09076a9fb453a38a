"""The user's own augmentation: the same crops in any batch, on any rank and from any start; errors that name a line."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.reading.quarantine import Quarantine
from streamtrain.config.load import build, merge, open_shard_set
from streamtrain.config.tree import Config
from streamtrain.data.augmentations import UserAugmentation
from streamtrain.data.loader import Loader
from streamtrain.errors import UserCodeError


def with_own(config: Config, name: str, **data: Any) -> Config:
    return build(merge(config.model_dump(), {"data": {"augmentations": f"own_code:{name}", **data}}))


def crops_of(config: Config, start: int, count: int, ranks: int = 1) -> dict[int, list[torch.Tensor]]:
    """Return the crops of ``count`` slots from ``start`` on, as the ranks of a run read them."""
    found: dict[int, list[torch.Tensor]] = {}
    for rank in range(ranks):
        with Loader(
            open_shard_set(config), config, rank=rank, world_size=ranks, device="cpu", start_slot=start
        ) as loader:  # fmt: skip
            for batch in islice(loader, count // config.data.micro_batch // ranks):
                for row, slot in enumerate(batch.slots.tolist()):
                    views = (batch.global_crops, batch.local_crops)
                    found[slot] = [crops[row :: len(batch.slots)].clone() for crops in views]
    return found


def is_equal(one: dict[int, list[torch.Tensor]], other: dict[int, list[torch.Tensor]]) -> bool:
    return all(torch.equal(a, b) for slot in one for a, b in zip(one[slot], other[slot], strict=True))


@pytest.fixture(scope="module")
def reference() -> Iterator[dict[str, Any]]:
    yield {}


@settings(max_examples=5)
@given(
    micro_batch=st.sampled_from([1, 2, 4]), ranks=st.integers(1, 3), start=st.integers(0, 1), threads=st.integers(1, 3)
)
def test_crops_depend_on_the_slot_only(
    shared_config: Config, reference: dict[str, Any], micro_batch: int, ranks: int, start: int, threads: int
) -> None:
    batch = {"global_batch": 24, "lanes": 1}
    if not reference:
        reference["crops"] = crops_of(with_own(shared_config, "invert", micro_batch=24, **batch), 0, 48)
    config = with_own(shared_config, "invert", micro_batch=micro_batch, decode_threads=threads, **batch)
    found = crops_of(config, 24 * start, 24, ranks)
    assert list(found) == list(range(24 * start, 24 * start + 24))
    assert is_equal(found, reference["crops"])


@pytest.fixture(scope="module")
def shared_config(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Config:
    from shards.packing.pack import PackOptions, pack

    path = tmp_path_factory.mktemp("own") / "set"
    pack(pictures, path, PackOptions(shard_bytes=16 << 10))
    return build({
        "run": {"seed": 5}, "data": {"shards": str(path), "reader_threads": 1},
        "crops": {"global_size": 32, "local_size": 16, "local_count": 2},
    })  # fmt: skip


def test_what_the_function_gets_and_returns(config: Config) -> None:
    plain, own = crops_of(config, 0, 8), crops_of(with_own(config, "transpose"), 0, 8)
    for slot, views in plain.items():
        for before, after in zip(views, own[slot], strict=True):
            assert torch.equal(before.transpose(1, 2), after)


def test_global_and_local_crops_and_slots_have_draws_of_their_own() -> None:
    own = UserAugmentation("own_code:invert", seed=3)
    black = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    results = [own(black.clone(), slot, is_local) for slot in (0, 1) for is_local in (False, True)]
    results.append(UserAugmentation("own_code:invert", seed=4)(black.clone(), 0, False))
    assert not any(torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


def test_a_whole_batch_is_augmented_like_its_samples() -> None:
    """As on a GPU, where the crops of a batch are made at once."""
    own = UserAugmentation("own_code:invert", seed=3)
    batch = torch.arange(2 * 3 * 8 * 8 * 3).to(torch.uint8).view(2 * 3, 8, 8, 3)
    expected = [own(batch[row::3].permute(0, 3, 1, 2).clone(), slot, True) for row, slot in enumerate((5, 6, 9))]
    own.augment_batch(batch, [5, 6, 9], True)
    for row, crops in enumerate(expected):
        assert torch.equal(batch[row::3].permute(0, 3, 1, 2), crops)
    own.augment_batch(batch[:0], [5, 6, 9], True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("to_float", r"must return uint8 \[2, 3, 64, 64\] on cpu, .*, not float32 \[2, 3, 64, 64\] on cpu \(slot 0\)"),
        ("to_list", r"must return crops, uint8 \[2, 3, 64, 64\] on cpu, not list \(slot 0\)"),
        ("cut", r".* not uint8 \[2, 3, 63, 64\] on cpu \(slot 0\)"),
        (
            "draw_globally",
            "returns other pixels when it is called again for slot 0; draw random numbers from generator",
        ),
        ("count_calls", "returns other pixels when it is called again for slot 0"),
        ("fail", r"failed for slot 0: IndexError: no such crop \\x1b\[31m \(.*own_code.py, line 52\)"),
        ("leave", r"failed for slot 0: SystemExit: 0 \(.*own_code.py, line 56\)"),
    ],
)
def test_a_fault_of_the_function_is_no_damaged_image(config: Config, name: str, message: str, tmp_path: Path) -> None:
    own = with_own(config, name, decode_threads=1)
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.5)
    with Loader(
        open_shard_set(own), own, rank=0, world_size=1, device="cpu", quarantine=quarantine
    ) as loader:  # fmt: skip
        with pytest.raises(UserCodeError, match=f"^data.augmentations=own_code:{name} {message}") as error:
            next(loader)
    assert "\n" not in str(error.value) and quarantine.num_entries == 0


def test_a_missing_function_leaves_no_thread_behind(config: Config) -> None:
    own = with_own(config, "nothing")
    with pytest.raises(UserCodeError, match="has no nothing"):
        Loader(open_shard_set(own), own, rank=0, world_size=1, device="cpu")


@pytest.mark.parametrize("raw", [
    {"objective": {"gram": {"weight": 1.0, "size": 64}}},
    {"objective": {"gram": {"weight": 1.0}}, "crops": {"sizes": [{"share": 1, "gram_size": 64}]}},
])  # fmt: skip
def test_not_together_with_separate_crops_of_the_gram_teacher(raw: dict[str, Any]) -> None:
    build(raw)
    with pytest.raises(ValueError, match=r"data\.augmentations cannot be combined with a size of the Gram teacher"):
        build(merge(raw, {"data": {"augmentations": "own_code:invert"}}))
