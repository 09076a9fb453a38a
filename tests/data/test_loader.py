"""The loader: same samples and pixels for any start, micro-batch and number of ranks; errors; shutdown."""

from __future__ import annotations

import gc
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_images import overwrite

from shards.errors import SampleError, ShardError
from shards.packing.pack import PackOptions, pack
from shards.reading.order import Order
from shards.reading.quarantine import Quarantine
from streamtrain.config.data import SetShare
from streamtrain.config.load import build, open_shard_set
from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch
from streamtrain.data.loader import Loader, micro_batch_slots
from streamtrain.data.masking import draw_masks, rasterise
from streamtrain.data.stream import check_state
from streamtrain.errors import CheckpointError, ConfigError

Damage = Callable[[Path, int, int, bytes], None]


def make_loader(config: Config, rank: int = 0, world_size: int = 1, start_slot: int = 0, **options: object) -> Loader:
    shard_set = open_shard_set(config)
    return Loader(shard_set, config, rank=rank, world_size=world_size, device="cpu", start_slot=start_slot, **options)


def with_data(config: Config, **changes: object) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def take(loader: Loader, count: int) -> list[Batch]:
    with loader:
        return list(itertools.islice(loader, count))


def group_by_slot(batches: list[Batch], config: Config) -> dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return each slot's global crops [V, ...], local crops [L, ...] and masks [V, T]."""
    samples = {}
    for batch in batches:
        size = len(batch.slots)
        crops = batch.global_crops.unflatten(0, (-1, size))
        local_crops = batch.local_crops.unflatten(0, (config.crops.local_count, size))
        masks = batch.masks.grid_mask.unflatten(0, (-1, size))
        for row, slot in enumerate(batch.slots.tolist()):
            assert slot not in samples
            samples[slot] = (crops[:, row], local_crops[:, row], masks[:, row])
    return samples


def assert_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for slot, parts in left.items():
        assert all(torch.equal(a, b) for a, b in zip(parts, right[slot], strict=True)), slot


def test_shapes_and_distinct_views(config: Config) -> None:
    batch = take(make_loader(config), 1)[0]
    assert batch.slots.tolist() == [0, 1, 2, 3]
    assert batch.global_crops.shape == (8, 64, 64, 3) and batch.global_crops.dtype == torch.uint8
    assert batch.local_crops.shape == (8, 32, 32, 3)
    assert batch.masks.grid_mask.shape == (8, 16)
    assert len(torch.unique(batch.global_crops.flatten(1), dim=0)) == 8


def test_batches_keep_their_pixels_while_the_loader_continues(config: Config) -> None:
    with make_loader(config) as loader:
        first = next(loader)
        copy = first.global_crops.clone()
        for _ in range(6):
            next(loader)
    assert torch.equal(first.global_crops, copy)


def test_a_resumed_stream_repeats_bit_for_bit(config: Config) -> None:
    straight = group_by_slot(take(make_loader(config), 9), config)  # more than an epoch of 26 samples
    resumed = group_by_slot(take(make_loader(config, start_slot=20), 4), config)
    assert_same(resumed, {slot: parts for slot, parts in straight.items() if slot >= 20})


def test_ranks_and_micro_batches_do_not_change_the_stream(config: Config) -> None:
    config = with_data(config, global_batch=8, micro_batch=8)
    one = group_by_slot(take(make_loader(config), 2), config)
    loaders = [make_loader(with_data(config, micro_batch=2), rank, 2) for rank in range(2)]
    two = group_by_slot([batch for loader in loaders for batch in take(loader, 4)], config)
    assert_same(one, two)


def test_every_slot_goes_to_exactly_one_rank() -> None:
    for world_size, micro_batch in [(1, 24), (2, 4), (3, 8), (8, 3), (4, 6)]:
        streams = [micro_batch_slots(48, 24, micro_batch, rank, world_size) for rank in range(world_size)]
        for step in range(3):
            taken = [next(stream) for stream in streams for _ in range(24 // world_size // micro_batch)]
            assert np.concatenate(taken).tolist() == list(range(48 + 24 * step, 72 + 24 * step))


def test_slots_continue_past_the_end_of_an_epoch(config: Config) -> None:
    with make_loader(with_data(config, micro_batch=13)) as loader:
        slots = [next(loader).slots for _ in range(5)]
    assert np.array_equal(np.concatenate(slots), np.arange(65))


def test_no_local_crops(config: Config) -> None:
    config = config.model_copy(update={"crops": config.crops.model_copy(update={"local_count": 0})})
    assert take(make_loader(config), 1)[0].local_crops.shape == (0, 32, 32, 3)


def test_wait_seconds_counts_the_consumers_wait(config: Config) -> None:
    with make_loader(config) as loader:
        next(loader)
        assert loader.seconds == loader.wait_seconds == 0
        for _ in range(3):
            time.sleep(0.2)
            next(loader)
        assert loader.seconds >= 0.6
        assert 0 <= loader.wait_seconds <= loader.seconds - 0.59


def test_check_state_names_the_differing_fields(config: Config) -> None:
    with make_loader(config) as loader:
        state = loader.state_dict(40)
    assert state["next_slot"] == 40
    check_state(state, state | {"next_slot": 0})
    with pytest.raises(CheckpointError, match=r"seed was 5 and is now 6.*window was 2 and is now 3"):
        check_state(state, state | {"seed": 6, "window": 3})


def test_lane_block_of_a_resumed_stream_is_preserved(config: Config) -> None:
    with make_loader(with_data(config, global_batch=32), lane_block=3) as loader:
        assert loader.state_dict(0)["lane_block"] == 3
    with make_loader(with_data(config, global_batch=32)) as loader:
        assert loader.state_dict(0)["lane_block"] == 8


@pytest.fixture
def mixed(config: Config, pictures: Path, tmp_path: Path) -> Config:
    """A mixture with a second set, which has a quarter of the stream."""
    pack(pictures, tmp_path / "other", PackOptions(shuffle=1, shard_bytes=30_000))
    sets = ((config.data.shares[0].shards, 3), (str(tmp_path / "other"), 1))
    return with_data(config, shards=tuple(SetShare(shards=s, weight=w) for s, w in sets), global_batch=8)


def test_a_mixture_does_not_depend_on_ranks_or_start(mixed: Config) -> None:
    straight = group_by_slot(take(make_loader(mixed), 8), mixed)
    loaders = [make_loader(mixed, rank, 2, start_slot=16) for rank in range(2)]
    two = group_by_slot([batch for loader in loaders for batch in take(loader, 2)], mixed)
    assert_same(two, {slot: parts for slot, parts in straight.items() if slot >= 16})


def test_a_mixture_with_different_sets_or_weights_is_a_different_stream(config: Config, mixed: Config) -> None:
    def state(config: Config) -> dict[str, object]:
        with make_loader(config) as loader:
            return json.loads(json.dumps(loader.state_dict(8)))

    first, second = mixed.data.shares
    check_state(state(mixed), state(mixed))
    for other in (config, with_data(mixed, shards=(first, second.model_copy(update={"weight": 2.0})))):
        with pytest.raises(CheckpointError, match=r"digest was '\w+' and is now '\w+'.*counts was"):
            check_state(state(mixed), state(other))
    with pytest.raises(CheckpointError, match=r"digest was"):
        check_state(state(mixed), state(with_data(mixed, shards=(second, first))))


def test_the_error_names_an_undecodable_image(config: Config, set_path: Path, damage_sample: Damage) -> None:
    damage_sample(set_path, 1, 2, b"this is a text file and no photograph")
    loader = make_loader(config)
    with pytest.raises(SampleError, match=r"shard 000001.tar, sample 2 .*not an image"):
        take(loader, 7)
    with pytest.raises(SampleError):
        next(loader)


def test_the_error_names_a_changed_image(config: Config) -> None:
    overwrite(open_shard_set(config), 0, 0, b"XXXX", skip=100)
    with pytest.raises(SampleError, match=r"000000\.tar, sample 0"):
        take(make_loader(config), 7)


def test_too_many_pixels_raise_before_decoding(config: Config) -> None:
    with pytest.raises(SampleError, match="more than 4000 pixels"):
        take(make_loader(with_data(config, max_pixels=4000)), 7)


def test_unusable_images_are_logged_and_replaced_equally_after_a_resume(
    config: Config, set_path: Path, damage_sample: Damage, tmp_path: Path
) -> None:
    undamaged = group_by_slot(take(make_loader(config), 7), config)
    first_slots = {}
    for slot in range(26):
        order = Order(open_shard_set(config).sizes, 5, 2, 4, lane_block=1)
        shard, sample = order.locate(np.array([slot]))
        first_slots[int(shard[0]), int(sample[0])] = slot
    damage_sample(set_path, 0, 1, b"a text file and no photograph")
    damage_sample(set_path, 1, 0, b"")
    overwrite(open_shard_set(config), 1, 2, b"XXXX", skip=100)  # fails the checksum
    damaged = {first_slots[position] for position in [(0, 1), (1, 0), (1, 2)]}

    quarantine = Quarantine(tmp_path / "quarantine.jsonl", max_rate=1.0)
    with make_loader(config, quarantine=quarantine) as loader:
        replaced = group_by_slot([next(loader) for _ in range(6)], config)
        assert loader.state_dict(24)["quarantine"] == quarantine.num_entries
    logged = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {(int(entry["shard"][:6]), entry["index"]) for entry in logged} == {(0, 1), (1, 0), (1, 2)}
    for slot, parts in replaced.items():
        assert torch.equal(parts[2], undamaged[slot][2])  # masks depend on the slot, not on the image
        assert torch.equal(parts[0], undamaged[slot][0]) == (slot not in damaged)
    resumed = make_loader(config, start_slot=8, quarantine=Quarantine(tmp_path / "quarantine.jsonl", max_rate=1.0))
    assert_same(group_by_slot(take(resumed, 4), config), {slot: replaced[slot] for slot in range(8, 24)})


def test_a_missing_set_raises_one_line(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.shards"):
        open_shard_set(with_data(config, shards=""))
    with pytest.raises(ShardError, match="nowhere"):
        open_shard_set(with_data(config, shards=str(tmp_path / "nowhere")))


def count_threads() -> int:
    """Count the threads of this process, including DALI's."""
    return len(list(Path("/proc/self/task").iterdir()))


def test_closing_ends_all_threads(config: Config) -> None:
    take(make_loader(config), 1)
    before = count_threads(), threading.active_count()
    for _ in range(3):
        loader = make_loader(config)
        next(loader)
        loader.close()
        loader.close()
        assert threading.active_count() == before[1]
    deadline = time.monotonic() + 10
    while count_threads() > before[0] and time.monotonic() < deadline:
        time.sleep(0.05)  # the kernel lists ended threads for a moment
    assert count_threads() <= before[0]


def test_an_unreferenced_loader_stops(config: Config) -> None:
    loader = make_loader(config)
    next(loader)
    del loader
    gc.collect()
    assert not any(thread.name == "loader" for thread in threading.enumerate())


def test_the_interpreter_exits_with_an_open_loader(config: Config) -> None:
    exits = {"": 0, "raise ValueError('end')": 1, "import sys; sys.exit(3)": 3}
    script = (
        "from streamtrain.config.load import build, open_shard_set\n"
        "from streamtrain.data.loader import Loader\n"
        f"config = build({config.model_dump(mode='json')!r})\n"
        "loader = Loader(open_shard_set(config), config, rank=0, world_size=1, device='cpu')\n"
        "next(loader)\n"
    )
    # in parallel: most of their time is imports
    processes = [subprocess.Popen([sys.executable, "-c", script + end], stderr=subprocess.PIPE) for end in exits]
    assert [process.communicate(timeout=300) and process.returncode for process in processes] == list(exits.values())


def test_alternating_sizes_repeat_bit_for_bit_from_any_start_and_on_any_rank(config: Config, set_path: Path) -> None:
    raw = config.model_dump(mode="json")
    raw["crops"]["sizes"] = [
        {"share": 0.5, "gram_size": 96},
        {"share": 0.5, "global_size": [32, 48], "local_size": 16, "gram_size": [64, 96]},
    ]
    raw["objective"]["gram"]["weight"] = 1.0
    raw["data"]["global_batch"] = 8
    config = build(raw)
    shard_set = open_shard_set(config)

    def take_batches(rank: int, start_slot: int, count: int) -> list:
        with Loader(shard_set, config, rank=rank, world_size=1 + rank, device="cpu", start_slot=start_slot) as loader:
            return list(itertools.islice(loader, count))

    straight = take_batches(0, 0, 12)
    shapes = [
        tuple(tuple(crops.shape[1:3]) for crops in (batch.global_crops, batch.local_crops, batch.gram_crops))
        for batch in straight
    ]
    # two micro-batches a step
    assert shapes[::2] == shapes[1::2]
    assert set(shapes) == {((64, 64), (32, 32), (96, 96)), ((32, 48), (16, 16), (64, 96))}
    for batch in straight:
        assert batch.gram_crops.shape[0] == batch.global_crops.shape[0]
        grid = (batch.global_crops.shape[1] // 16, batch.global_crops.shape[2] // 16)
        drawn = draw_masks(config.masks, config.run.seed, batch.slots, 2, grid)
        expected = rasterise(drawn, grid, int(drawn.counts.sum()), "cpu").grid_mask
        assert torch.equal(batch.masks.grid_mask, expected)
    resumed, second_rank = take_batches(0, 24, 6), take_batches(1, 24, 3)
    pairs = [*zip(resumed, straight[6:], strict=True), *zip(second_rank, straight[7::2], strict=True)]
    for batch, expected in pairs:
        assert all(torch.equal(a, b) for a, b in zip(batch.tensors(), expected.tensors(), strict=True))


@pytest.mark.gpu
def test_gpu_batches_repeat_after_a_resume(config: Config) -> None:
    shard_set = open_shard_set(config)

    def on_gpu(start_slot: int, count: int) -> list[Batch]:
        return take(Loader(shard_set, config, rank=0, world_size=1, device="cuda", start_slot=start_slot), count)

    straight, resumed = on_gpu(0, 6), on_gpu(8, 4)
    assert all(batch.global_crops.is_cuda and batch.masks.index.is_cuda for batch in straight)
    assert_same(group_by_slot(resumed, config), group_by_slot(straight[2:], config))
