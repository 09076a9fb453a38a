"""The folder of a cache never holds more than its limit, whoever does what in which order, and loses nothing in use."""

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
    """Several ledgers of one folder, as several processes have them (the locks are of open files, not of processes)."""

    @initialize(limit=st.integers(450, 1500), count=st.integers(1, 3))
    def start(self, limit: int, count: int) -> None:
        self.folder, self.limit = Path(tempfile.mkdtemp()), limit
        (self.folder / "mine.tar").write_bytes(b"not of the cache")
        self.ledgers = [Ledger(self.folder, limit) for _ in range(count)]
        self.told: list[dict[str, int]] = [{} for _ in range(count)]
        self.coming: dict[str, Reservation] = {}
        self.reading: list[tuple[str, int]] = []

    def teardown(self) -> None:
        for _, descriptor in self.reading:
            os.close(descriptor)
        for reservation in self.coming.values():
            reservation.release()
        for ledger in self.ledgers:
            ledger.close()
        shutil.rmtree(self.folder)

    @rule(which=st.integers(0, 2), uses=st.dictionaries(_KEYS, st.integers(0, 9)))
    def publish(self, which: int, uses: dict[str, int]) -> None:
        which %= len(self.ledgers)
        self.ledgers[which].publish(uses)
        self.told[which] = uses

    @rule(which=st.integers(0, 2), key=_KEYS)
    def reserve(self, which: int, key: str) -> None:
        before = self.ledgers[0].present()
        given = self.ledgers[which % len(self.ledgers)].reserve(key, _SIZES[key])
        gone = before - self.ledgers[0].present()
        use = {key: min([NEVER, *(told[key] for told in self.told if key in told)]) for key in _SIZES}
        assert not gone & {key for key, _ in self.reading}
        if isinstance(given, Reservation):
            assert key not in before and key not in self.coming
            self.coming[key] = given
            assert all(use[old] > use[key] for old in gone)
            stayed = before - gone - {key for key, _ in self.reading}
            assert not gone or max((use[old] for old in stayed), default=0) <= max(use[old] for old in gone)
        else:
            assert not gone
            assert (given is Refusal.PRESENT) == (key in before)
            assert (given is Refusal.BUSY) == (key in self.coming)

    @precondition(lambda self: self.coming)
    @rule(data=st.data(), part=st.floats(0, 1))
    def some_comes(self, data: st.DataObject, part: float) -> None:
        key = data.draw(st.sampled_from(sorted(self.coming)))
        self.coming[key].path.write_bytes(b"x" * int(part * _SIZES[key]))

    @precondition(lambda self: self.coming)
    @rule(data=st.data(), how=st.sampled_from(["commit", "release", "discard"]))
    def end(self, data: st.DataObject, how: str) -> None:
        key = data.draw(st.sampled_from(sorted(self.coming)))
        reservation = self.coming.pop(key)
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
        self.ledgers[which], self.told[which] = Ledger(self.folder, self.limit), {}

    @invariant()
    def within_the_limit(self) -> None:
        if hasattr(self, "folder"):
            assert folder_bytes(self.folder) <= self.limit + len(b"not of the cache")
            assert (self.folder / "mine.tar").read_bytes() == b"not of the cache"
            assert {key for key, _ in self.reading} <= self.ledgers[0].present()


_Processes.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestProcesses = _Processes.TestCase


def _key(number: int) -> str:
    return f"{number:032x}"


def test_what_is_needed_last_goes_first_and_only_when_that_helps(tmp_path: Path) -> None:
    ledger, other = Ledger(tmp_path, 1000), Ledger(tmp_path, 1000)
    for number in range(3):
        reservation = ledger.reserve(_key(number), 250)
        assert isinstance(reservation, Reservation)
        fetch(reservation, 250)
    ledger.publish({_key(0): 5, _key(1): 0, _key(3): 3})
    other.publish({_key(2): 1, _key(0): 7})
    # key 0 is needed in 5, key 3 in 3: it may take that place, but no other
    assert ledger.reserve(_key(3), 600) is Refusal.FULL
    assert ledger.present() == {_key(0), _key(1), _key(2)}
    assert isinstance(ledger.reserve(_key(3), 250), Reservation)
    assert ledger.present() == {_key(1), _key(2)}
    assert other.reserve(_key(3), 250) is Refusal.BUSY
    # nobody is known to need key 4, so that it takes nobody's place
    assert other.reserve(_key(4), 250) is Refusal.FULL
    other.close()
    ledger.close()


def test_a_lower_limit_holds_from_the_start_on(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 1000)
    for number in range(3):
        reservation = ledger.reserve(_key(number), 300)
        assert isinstance(reservation, Reservation)
        fetch(reservation, 300)
    ledger.close()
    Ledger(tmp_path, 650).close()
    assert folder_bytes(tmp_path) == 600


def test_a_file_of_another_length_is_dropped(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 1000)
    (tmp_path / f"{_key(1)}.shard").write_bytes(b"short")
    assert ledger.open(_key(1), 300) is None
    assert ledger.present() == set()
    ledger.close()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
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


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 1000)
    reservation = ledger.reserve(_key(0), 300)
    assert isinstance(reservation, Reservation)
    fetch(reservation, 300)
    child = subprocess.Popen([sys.executable, "-c", _HOLD_AND_WAIT, tmp_path], cwd=_ROOT, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    ledger.publish({_key(2): 0})
    assert ledger.reserve(_key(2), 400) is Refusal.FULL
    assert ledger.reserve(_key(1), 300) is Refusal.BUSY
    child.send_signal(signal.SIGKILL)
    child.communicate()
    taken_over = ledger.reserve(_key(1), 300)
    assert isinstance(taken_over, Reservation) and taken_over.path.read_bytes() == b"half"
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
    ledger.publish({key: place for place, key in enumerate(dict.fromkeys(keys))})
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


def test_competing_processes_killed_at_any_moment_stay_within_the_limit(tmp_path: Path) -> None:
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
    # and what was left behind is in nobody's way
    ledger = Ledger(tmp_path, 20_000)
    ledger.publish({_key(99): 0})
    assert isinstance(ledger.reserve(_key(99), 19_000), Reservation)
    ledger.close()
