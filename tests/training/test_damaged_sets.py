"""A run over a set with 1% damaged images: five kinds of damage, made before or after indexing."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from drawn_images import drawn_image, encoded
from ranks import run_ranks, start_ranks
from tiny_run import command, logged
from training.test_loop import expect_success, wait_for_steps

from shards.format.records import load_index, save_index
from shards.packing.index_tars import index_tars
from shards.packing.verify import verify
from shards.reading.order import Order
from shards.reading.shard_set import ShardSet

NUM_SHARDS, NUM_PER_SHARD, BATCH = 5, 100, 20
NUM_IMAGES = NUM_SHARDS * NUM_PER_SHARD
WAYS = ("truncated", "zeroed tail", "text", "flipped bits", "empty")
Place = tuple[str, int]  # tar, sample


def damaged(payload: bytes, way: str) -> bytes:
    """Return the damaged bytes of an image."""
    half = len(payload) // 2
    if way == "flipped bits":
        changed = bytearray(payload)
        for at in range(len(payload) - 40, len(payload) - 10, 7):  # in the scan, behind the tables
            changed[at] ^= 0x10
        return bytes(changed)
    return {
        "truncated": payload[:half],
        "zeroed tail": payload[:half].ljust(len(payload), b"\0"),
        "text": (b"<html>not found</html> " * len(payload))[: len(payload)],
        "empty": b"",
    }[way]


@pytest.fixture(scope="module")
def places() -> dict[str, dict[Place, str]]:
    """Return the positions and kinds of the damage made before and after indexing."""
    drawn = np.random.default_rng(3).permutation(NUM_IMAGES)[: 2 * len(WAYS)].tolist()
    named = [(f"{n // NUM_PER_SHARD:06d}-{n // NUM_PER_SHARD}.tar", n % NUM_PER_SHARD) for n in drawn]
    return {
        "before": dict(zip(named[: len(WAYS)], WAYS, strict=True)),
        "after": dict(zip(named[len(WAYS) :], WAYS, strict=True)),
    }


@pytest.fixture(scope="module")
def shard_set(places: dict[str, dict[Place, str]], tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Damaged tars, indexed in place, and damaged again."""
    folder = tmp_path_factory.mktemp("damaged")
    for shard in range(NUM_SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for sample in range(NUM_PER_SHARD):
                payload = encoded(drawn_image(shard * NUM_PER_SHARD + sample, 36, 28))
                way = places["before"].get((f"{shard:06d}-{shard}.tar", sample))
                payload = damaged(payload, way) if way else payload
                header = tarfile.TarInfo(f"{shard}-{sample:03d}.jpg")
                header.size = len(payload)
                tar.addfile(header, io.BytesIO(payload))
    index_tars([str(folder)], folder / "set")
    shard_set = ShardSet.open(folder / "set")
    for (name, sample), way in places["after"].items():
        shard = int(name[:6])
        payload = shard_set.read(shard, sample)
        with open(shard_set.tar_path(shard), "r+b") as tar_file:
            tar_file.seek(int(shard_set.record(shard, sample)["offset"]))
            tar_file.write(damaged(payload, way).ljust(len(payload), b"\xff"))
    return ShardSet.open(folder / "set")


def quarantined(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "quarantine.jsonl").read_text().splitlines()]


def test_damaged_images_are_quarantined_and_replaced_the_same_after_a_kill(
    shard_set: ShardSet, places: dict[str, dict[Place, str]], tmp_path: Path
) -> None:
    # flipped bits decode to another picture; only a checksum finds them, and these were indexed after the damage
    expected = {place for place, way in places["before"].items() if way != "flipped bits"} | set(places["after"])
    faults = [fault for fault in verify(shard_set.path) if fault.index is not None]
    assert {(fault.file.removeprefix("shards/"), fault.index) for fault in faults} == expected

    settings = (f"run.steps={NUM_IMAGES // BATCH}", f"data.micro_batch={BATCH}", "run.checkpoint_every=4")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    expect_success(run_ranks(command(shard_set.path, straight, *settings), 1))
    log = quarantined(straight)
    order = Order(shard_set.sizes, 0, lanes=2, lane_block=BATCH // 2)
    shards, samples = order.locate(np.arange(NUM_IMAGES))
    stands = zip(map(shard_set.name, shards.tolist()), samples.tolist(), strict=True)
    slots = {place: slot for slot, place in enumerate(stands)}
    consumed = [entry for entry in log if int(str(entry["slot"])) < NUM_IMAGES]
    assert {(entry["shard"], entry["index"]) for entry in consumed} == expected
    assert {(entry["shard"], entry["index"]) for entry in log} == expected  # threads read ahead into the next epoch
    assert {slots[place] for place in expected} <= {entry["slot"] for entry in consumed}

    processes = start_ranks(command(shard_set.path, broken, *settings), 1)
    wait_for_steps(broken, 10, processes)
    processes[0].kill()
    processes[0].communicate()
    expect_success(run_ranks(command(shard_set.path, broken, *settings), 1))
    assert logged(broken) == logged(straight)

    def known(run_dir: Path) -> set[str]:
        return {json.dumps(entry) for entry in quarantined(run_dir) if int(str(entry["slot"])) < NUM_IMAGES}

    assert known(broken) == known(straight)


@pytest.fixture
def indexes(shard_set: ShardSet, tmp_path: Path) -> list[Path]:
    """Return the index files of a set with the same tars, private to the test."""
    shutil.copytree(shard_set.path, tmp_path / "set")
    return sorted((tmp_path / "set" / "index").glob("*.npy"))


@pytest.mark.slow
def test_damaged_indexes_end_neither_a_run_nor_a_start_after_it(indexes: list[Path], tmp_path: Path) -> None:
    records = np.array(load_index(indexes[0]))
    records["width"][::9] ^= 1 << 15
    records["height"][1::9] = 0
    records["label"][2::9] = -(2**30)
    save_index(records, indexes[0])
    content = bytearray(indexes[1].read_bytes())
    content[-500] ^= 4  # in the records
    indexes[1].write_bytes(content)
    settings = (f"data.micro_batch={BATCH}", "data.max_unusable_share=1", "run.checkpoint_every=2")
    words = command(tmp_path / "set", tmp_path / "run", *settings)
    for steps in (NUM_IMAGES // BATCH // 2, NUM_IMAGES // BATCH):
        expect_success(run_ranks([*words, f"run.steps={steps}"], 1))
    reasons = " ".join(str(entry["reason"]) for entry in quarantined(tmp_path / "run"))
    for reason in ("the index has", "0 pixels with flags", "label -1073741824", "are damaged (wrong CRC-32)"):
        assert reason in reasons


def test_indexes_truncated_during_a_run_end_no_process_by_a_signal(indexes: list[Path], tmp_path: Path) -> None:
    words = command(tmp_path / "set", tmp_path / "run", f"data.micro_batch={BATCH}", "run.checkpoint_every=1")
    processes = start_ranks([*words, "run.steps=15"], 1)
    wait_for_steps(tmp_path / "run", 2, processes)
    for index in indexes:
        index.write_bytes(b"")
    processes[0].communicate()
    assert processes[0].returncode in (0, 2)
    ((code, _, error),) = run_ranks([*words, "run.steps=20"], 1)
    assert code == 2 and "is truncated; copy the set again" in error and error.count("\n") == 1
