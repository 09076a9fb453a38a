"""64 ranks on 8 machines, simulated: the start check, the order, the plan of the cache, and reading a checkpoint."""

from __future__ import annotations

import itertools
import json
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import free_port
from safetensors.torch import save_file
from sealed import seal

from shards.reading.order import Order
from streamtrain.checkpoint import reader as checkpoint
from streamtrain.checkpoint.writer import write_fragments
from streamtrain.data.loader import micro_batch_slots
from streamtrain.data.stream import find_lanes
from streamtrain.engine.fragments import Fragment
from streamtrain.engine.meeting import FailedStart, StartFacts, meet
from streamtrain.engine.rendezvous import AGENT_STORE, Launch

WORLD, LOCAL = 64, 8
RANKS = range(WORLD)


@pytest.mark.parametrize("wrong", [None, 37])
def test_all_start_or_all_end_with_one_reason(wrong: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch looks up the name of each address, which takes seconds where the name server ignores such questions
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RES_OPTIONS": "timeout:1 attempts:1"}
    for name, value in {**variables, AGENT_STORE: "False"}.items():
        monkeypatch.setenv(name, value)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        # the ranks set them
        monkeypatch.setenv(name, "lo")

    def run(rank: int) -> str:
        facts = StartFacts({"run.seed": "7" if rank == wrong else "0"})
        try:
            store = meet(Launch(rank, WORLD, rank % LOCAL, LOCAL), timedelta(seconds=60), facts)
        except FailedStart as error:
            return str(error)
        # rank 0 serves the store until all have used it
        store.add("arrived", 1)
        while rank == 0 and store.add("arrived", 0) < WORLD:
            time.sleep(0.01)
        return "started"

    with ThreadPoolExecutor(WORLD) as pool:
        found = set(pool.map(run, RANKS))
    if wrong is None:
        assert found == {"started"}
    else:
        place = f"{socket.gethostname()} (rank {wrong})"
        assert len(found) == 1 and f"run.seed is 7 on {place}" in found.pop()


@pytest.mark.parametrize("lanes", [1, 64, 4096])
def test_the_ranks_read_each_image_once_an_epoch_and_only_planned_shards(lanes: int) -> None:
    micro_batch, accumulation = 2, 2
    batch = micro_batch * accumulation * WORLD
    # as many images as in whole batches
    sizes = np.random.default_rng(0).multinomial(16 * batch, np.full(300, 1 / 300))
    share = batch // WORLD
    # from the middle of an epoch
    start = 5 * batch
    seen: Counter[tuple[int, int]] = Counter()
    for rank in RANKS:
        order = Order(sizes, seed=3, window=2, lanes=lanes, lane_block=max(1, batch // lanes))
        steps = itertools.islice(micro_batch_slots(start, batch, micro_batch, rank, WORLD), 16 * accumulation)
        slots = np.concatenate(list(steps))
        shards, samples = order.locate(slots)
        seen.update(zip(shards.tolist(), samples.tolist(), (slots // (16 * batch)).tolist(), strict=True))
        own = find_lanes(order, batch, start, range(share * rank, share * (rank + 1)))
        machine = rank // LOCAL * LOCAL
        of_machine = find_lanes(order, batch, start, range(share * machine, share * (machine + LOCAL)))
        assert own <= of_machine
        windows = itertools.takewhile(lambda w: w.first_slot < start + 16 * batch, order.windows(start, own))
        assert set(shards.tolist()) <= {shard for window in windows for shard in window.shards}
        if lanes >= WORLD:
            # a machine copies a part of the set, not all of it
            assert len(of_machine) <= max(1, order.lanes * LOCAL // WORLD)
    # 11 batches of one epoch and 5 of the next: an image is seen at most once in each
    assert set(seen.values()) == {1} and len(seen) == 16 * batch


class _Values:
    def __init__(self, values: torch.Tensor) -> None:
        self.numel, self._values = values.numel(), values

    def read(self) -> torch.Tensor:
        return self._values


@pytest.mark.parametrize("readers", [64, 63, 1])
def test_a_checkpoint_is_read_by_other_numbers_of_ranks_with_few_files_each(
    readers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {"backbone.large": (100, 129), "backbone.small": (3,)}
    values = {name: torch.randn(shape) for name, shape in shapes.items()}
    folder = checkpoint.step_folder(tmp_path, 7)
    folder.mkdir(parents=True)
    for rank in RANKS:
        shards = {}
        for name, value in values.items():
            padded = torch.nn.functional.pad(value.flatten(), (0, -value.numel() % WORLD))
            shards[f"ema/{name}"] = _Values(padded.chunk(WORLD)[rank].clone())
        write_fragments(folder / checkpoint.rank_name(rank, WORLD), shards)  # type: ignore[arg-type]
    save_file({}, folder / checkpoint.SHARED_NAME)
    state = {"version": checkpoint.VERSION, "step": 7, "world_size": WORLD, "shapes": shapes}
    (folder / "state.json").write_text(json.dumps(state))
    seal(folder)

    opened: list[Path] = []
    fragment_file = checkpoint._FragmentFile
    monkeypatch.setattr(checkpoint, "_FragmentFile", lambda path: opened.append(path) or fragment_file(path))  # type: ignore[func-returns-value]
    for reader in range(readers):
        opened.clear()
        with checkpoint.open_checkpoint(folder, is_verified=True) as found:
            for name, value in values.items():
                flat = value.flatten()
                numel = -(-len(flat) // readers)
                start, stop = min(reader * numel, len(flat)), min((reader + 1) * numel, len(flat))
                part = found.read(f"ema/{name}", Fragment(shapes[name], start, stop, numel))
                assert torch.equal(part[: stop - start], flat[start:stop]) and not part[stop - start :].any()
        # of each parameter, the files whose parts meet its own
        assert len(opened) <= sum(-(-WORLD // readers) + (WORLD % readers > 0) for _ in shapes)
