"""The cache folder never exceeds its limit and keeps files in use, for any sequence of operations and kills."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from watched_folder import folder_bytes

from shards.errors import ShardError
from shards.reading.ledger import NEVER, Ledger, Refusal, Reservation

_ROOT = Path(__file__).resolve().parents[3]
_SIZES = {hashlib.md5(name).hexdigest(): 100 * (number + 1) for number, name in enumerate((b"a", b"b", b"c", b"d"))}
_KEYS = st.sampled_from(sorted(_SIZES))


def fetch(reservation: Reservation, num_bytes: int) -> None:
    reservation.path.write_bytes(b"x" * num_bytes)
    reservation.commit()


class _Processes(RuleBasedStateMachine):
    """Several ledgers of one folder stand for several processes (locks belong to open files, not to processes)."""

    @initialize(limit=st.integers(450, 1500), count=st.integers(1, 3))
    def start(self, limit: int, count: int) -> None:
        self.folder, self.limit = Path(tempfile.mkdtemp()), limit
        (self.folder / "mine.tar").write_bytes(b"not a cache file")
        self.ledgers = [Ledger(self.folder, limit) for _ in range(count)]
        self.published: list[dict[str, int]] = [{} for _ in range(count)]
        self.reserved: dict[str, Reservation] = {}
        self.reading: list[tuple[str, int]] = []

    def teardown(self) -> None:
        for _, descriptor in self.reading:
            os.close(descriptor)
        for reservation in self.reserved.values():
            reservation.release()
        for ledger in self.ledgers:
            ledger.close()
        shutil.rmtree(self.folder)

    @rule(which=st.integers(0, 2), uses=st.dictionaries(_KEYS, st.integers(0, 9)))
    def publish(self, which: int, uses: dict[str, int]) -> None:
        which %= len(self.ledgers)
        self.ledgers[which].publish(uses)
        self.published[which] = uses

    @rule(which=st.integers(0, 2), key=_KEYS)
    def reserve(self, which: int, key: str) -> None:
        before = self.ledgers[0].present()
        result = self.ledgers[which % len(self.ledgers)].reserve(key, _SIZES[key])
        evicted = before - self.ledgers[0].present()
        use = {key: min([NEVER, *(uses[key] for uses in self.published if key in uses)]) for key in _SIZES}
        assert not evicted & {key for key, _ in self.reading}
        if isinstance(result, Reservation):
            assert key not in before and key not in self.reserved
            self.reserved[key] = result
            assert all(use[old] > use[key] for old in evicted)
            stayed = before - evicted - {key for key, _ in self.reading}
            assert not evicted or max((use[old] for old in stayed), default=0) <= max(use[old] for old in evicted)
        else:
            assert not evicted
            assert (result is Refusal.PRESENT) == (key in before)
            assert (result is Refusal.BUSY) == (key in self.reserved)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), part=st.floats(0, 1))
    def write_part(self, data: st.DataObject, part: float) -> None:
        key = data.draw(st.sampled_from(sorted(self.reserved)))
        self.reserved[key].path.write_bytes(b"x" * int(part * _SIZES[key]))

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), how=st.sampled_from(["commit", "release", "discard"]))
    def end(self, data: st.DataObject, how: str) -> None:
        key = data.draw(st.sampled_from(sorted(self.reserved)))
        reservation = self.reserved.pop(key)
        if how == "commit":
            fetch(reservation, _SIZES[key])
        else:
            getattr(reservation, how)()

    @rule(which=st.integers(0, 2), key=_KEYS)
    def read(self, which: int, key: str) -> None:
        ledger = self.ledgers[which % len(self.ledgers)]
        descriptor = ledger.open(key, _SIZES[key])
        assert (descriptor is not None) == (key in ledger.present())
        if descriptor is not None:
            self.reading.append((key, descriptor))

    @precondition(lambda self: self.reading)
    @rule(data=st.data())
    def end_reading(self, data: st.DataObject) -> None:
        os.close(self.reading.pop(data.draw(st.integers(0, len(self.reading) - 1)))[1])

    @rule(key=_KEYS)
    def discard(self, key: str) -> None:
        self.ledgers[0].discard(key)
        assert (key in self.ledgers[0].present()) <= (key in {key for key, _ in self.reading})

    @rule(which=st.integers(0, 2))
    def restart(self, which: int) -> None:
        which %= len(self.ledgers)
        self.ledgers[which].close()
        self.ledgers[which], self.published[which] = Ledger(self.folder, self.limit), {}

    @invariant()
    def within_the_limit(self) -> None:
        if hasattr(self, "folder"):
            assert folder_bytes(self.folder) <= self.limit + len(b"not a cache file")
            assert (self.folder / "mine.tar").read_bytes() == b"not a cache file"
            assert {key for key, _ in self.reading} <= self.ledgers[0].present()


_Processes.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestProcesses = _Processes.TestCase


def _key(number: int) -> str:
    return f"{number:032x}"


def add_files(ledger: Ledger, count: int, num_bytes: int) -> None:
    for number in range(count):
        reservation = ledger.reserve(_key(number), num_bytes)
        assert isinstance(reservation, Reservation)
        fetch(reservation, num_bytes)


def test_eviction_of_the_latest_use_and_only_if_it_makes_enough_room(tmp_path: Path) -> None:
    ledger, other = Ledger(tmp_path, 1000), Ledger(tmp_path, 1000)
    add_files(ledger, 3, 250)
    ledger.publish({_key(0): 5, _key(1): 0, _key(3): 3})
    other.publish({_key(2): 1, _key(0): 7})
    # key 0 is needed in 5, key 3 in 3: key 3 may evict key 0, but no other file
    assert ledger.reserve(_key(3), 600) is Refusal.FULL
    assert ledger.present() == {_key(0), _key(1), _key(2)}
    assert isinstance(ledger.reserve(_key(3), 250), Reservation)
    assert ledger.present() == {_key(1), _key(2)}
    assert other.reserve(_key(3), 250) is Refusal.BUSY
    # no process needs key 4, so it may not evict any file
    assert other.reserve(_key(4), 250) is Refusal.FULL
    other.close()
    ledger.close()


def test_lower_limit_applies_at_start(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 1000)
    add_files(ledger, 3, 300)
    ledger.close()
    Ledger(tmp_path, 650).close()
    assert folder_bytes(tmp_path) == 600


def test_file_of_another_length_is_deleted(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 1000)
    (tmp_path / f"{_key(1)}.shard").write_bytes(b"short")
    assert ledger.open(_key(1), 300) is None
    assert ledger.present() == set()
    ledger.close()


def test_unusable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ShardError, match=r"the cache folder .*file/cache cannot be used"):
        Ledger(tmp_path / "file" / "cache", 1000)


_HOLD_AND_WAIT = """
import sys, time
from pathlib import Path
from shards.reading.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]), 1000)
ledger.publish({f"{0:032x}": 0, f"{1:032x}": 0})
descriptor = ledger.open(f"{0:032x}", 300)
reservation = ledger.reserve(f"{1:032x}", 300)
reservation.path.write_bytes(b"half")
print("ready", flush=True)
time.sleep(600)
"""


def test_killed_process_releases_its_claims(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 1000)
    add_files(ledger, 1, 300)
    child = subprocess.Popen([sys.executable, "-c", _HOLD_AND_WAIT, tmp_path], cwd=_ROOT, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    ledger.publish({_key(2): 0})
    assert ledger.reserve(_key(2), 400) is Refusal.FULL
    assert ledger.reserve(_key(1), 300) is Refusal.BUSY
    child.send_signal(signal.SIGKILL)
    child.communicate()
    resumed = ledger.reserve(_key(1), 300)
    assert isinstance(resumed, Reservation) and resumed.path.read_bytes() == b"half"
    assert isinstance(ledger.reserve(_key(2), 400), Reservation)
    assert ledger.present() == set() and len(list(tmp_path.glob("*.user"))) == 1
    ledger.close()


_COMPETE = """
import os, random, sys, time
from pathlib import Path
from shards.reading.ledger import NEVER, Ledger, Refusal
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
ledger, draw = Ledger(folder, 20_000), random.Random(seed)
while True:
    keys = [f"{draw.randrange(30):032x}" for _ in range(5)]
    ledger.publish({key: distance for distance, key in enumerate(dict.fromkeys(keys))})
    for key in keys:
        num_bytes = 1000 + 200 * int(key[-1], 16)
        given = ledger.reserve(key, num_bytes)
        if not isinstance(given, Refusal):
            with open(given.path, "r+b") as file:
                file.truncate(0)
                for _ in range(4):
                    file.write(key.encode() * (num_bytes // 4 // 32))
                    file.flush()
                    time.sleep(0.0005)
                file.write(b"." * (num_bytes - file.tell()))
            given.commit()
        descriptor = ledger.open(key, num_bytes)
        if descriptor is not None:
            assert os.pread(descriptor, 32, 0) == key.encode()
            os.close(descriptor)
"""


def test_killed_competing_processes_stay_within_the_limit(tmp_path: Path) -> None:
    def start(seed: int) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-c", _COMPETE, str(tmp_path), str(seed)]
        return subprocess.Popen(words, cwd=_ROOT, stderr=subprocess.PIPE)

    children = [start(seed) for seed in range(3)]
    largest, looks, fetched = 0, 0, set[str]()
    ends = time.monotonic() + 4
    kills = 0
    while time.monotonic() < ends:
        largest, looks = max(largest, folder_bytes(tmp_path)), looks + 1
        fetched |= {name for name in os.listdir(tmp_path) if name.endswith(".shard")}
        if looks % 300 == 299:
            victim = children.pop(0)
            assert victim.poll() is None, victim.communicate()[1].decode()
            victim.kill()
            victim.communicate()
            kills += 1
            children.append(start(10 + kills))
        time.sleep(0.001)
    for child in children:
        child.kill()
        child.communicate()
    assert 15_000 < largest <= 20_000
    assert kills >= 2 and len(fetched) > 12
    # files of killed processes are evicted when room is needed
    ledger = Ledger(tmp_path, 20_000)
    ledger.publish({_key(99): 0})
    assert isinstance(ledger.reserve(_key(99), 19_000), Reservation)
    ledger.close()
