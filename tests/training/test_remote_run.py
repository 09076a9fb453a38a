"""Training from a faulty server uses the same samples as a local run, and its cache stays within the limit."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest
from drawn_images import packed_set
from faulty_s3 import FaultyS3, faulty_s3
from faulty_server import FaultyServer, faulty_server
from ranks import run_ranks
from tiny_run import command, logged
from watched_folder import watched

from shards.reading.cache import min_cache_bytes
from shards.reading.order import Order
from shards.reading.shard_set import ShardSet
from streamtrain import export

STEPS = 24  # of 8 samples: two epochs
SETTINGS = (f"run.steps={STEPS}", "data.window=2", "run.checkpoint_every=3", "data.read_ahead_bytes=4000")
FAULTS = [None, "503", "cut", None, "short", "stall", "whole", None, "503", "cut", None, "short", None]


@dataclass
class Remote:
    """A shard set on a server."""

    url: str
    server: FaultyServer | FaultyS3
    path: str  # of the set, as ``server.gone`` has it

    def fault_count(self) -> int:
        """Number of faults the server has injected so far."""
        if isinstance(self.server, FaultyS3):
            return sum(fault != "404" for fault in self.server.served)
        return sum(fault not in (None, "whole") for _, fault in self.server.gets)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return packed_set(tmp_path_factory.mktemp("origin"), 96, shard_bytes=8_000)


@pytest.fixture(scope="module")
def expected(local: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> dict[int, object]:
    """The log of a run from the local set."""
    run_dir = tmp_path_factory.mktemp("local")
    results = run_ranks(command(local.path, run_dir, *SETTINGS), 2)
    assert [code for code, _, _ in results] == [0, 0], results[0][2][-3000:]
    return logged(run_dir)


@contextmanager
def behind(kind: str, local: ShardSet, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    if kind == "http":
        with faulty_server(local.path.parent) as server:
            yield Remote(f"{server.url}/set", server, "/set")
        return
    with faulty_s3() as s3:
        s3.set_environment(monkeypatch)
        store = fsspec.filesystem("s3", skip_instance_cache=True)
        store.mkdir("bucket")
        store.put(str(local.path), "bucket/set", recursive=True)
        yield Remote("s3://bucket/set", s3, "/bucket/set")


def late_shard_of_rank_0(local: ShardSet) -> str:
    """Return the tar that rank 0 alone reads last in the first epoch."""
    order = Order(local.sizes, seed=0, window=2, lanes=2, lane_block=4)
    assert order.lanes == 2

    def read_by(lane: int) -> list[int]:
        blocks = itertools.takewhile(lambda block: block.first_slot < local.num_samples, order.windows(0, [lane]))
        return [shard for block in blocks for shard in block.shards]

    *_, last = (shard for shard in read_by(0) if shard not in read_by(1))
    return local.name(last)


def words_of(remote: Remote, local: ShardSet, cache: Path, run_dir: Path) -> tuple[list[str], int]:
    """Return the command of a run through a cache, and the cache's limit."""
    # two lanes of two shards are in use at a time, plus one shard being fetched
    limit = min_cache_bytes(local.manifest.shards, 5, 2)
    assert local.manifest.num_bytes > 1.5 * limit
    settings = [*SETTINGS, f"data.cache.dir={cache}", f"data.cache.limit={limit}"]
    return command(remote.url, run_dir, *settings, "data.remote={stall_seconds: 1.5, deadline_seconds: 60}"), limit


def finish(words: list[str], remote: Remote) -> str:
    """Run to the end despite faults; return the output of the ranks."""
    remote.server.faults = [*FAULTS]
    results = run_ranks(words, 2)
    assert [code for code, _, _ in results] == [0, 0], results[0][2][-3000:]
    assert not remote.server.faults
    return "".join(errors for _, _, errors in results)


def check(run_dir: Path, expected: dict[int, object], said: str, remote: Remote, most: int, limit: int) -> None:
    assert logged(run_dir) == expected
    assert 0.6 * limit < most <= limit
    told = len(re.findall(r"attempt \d+ failed", said)) - len(re.findall("not found", said))
    assert told >= remote.fault_count() >= sum(fault not in (None, "whole") for fault in FAULTS)
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["data/downloaded_bytes"] > 0 and 0 < last["data/cache_hit_share"] <= 1 and "data/retries" in last


@pytest.mark.slow
def test_over_http_two_ranks_train_on_the_same_samples_despite_faults(
    local: ShardSet, expected: dict[int, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, run_dir = tmp_path / "cache", tmp_path / "run"
    with behind("http", local, monkeypatch) as remote, watched(cache) as most:
        words, limit = words_of(remote, local, cache, run_dir)
        missing = late_shard_of_rank_0(local)
        remote.server.gone.add(f"{remote.path}/shards/{missing}")
        remote.server.faults = [None, "503", None, "cut", None, "short"]
        (code, _, first), (other, _, second) = run_ranks(words, 2)
        assert code == 2 and other != 0 and "Traceback" not in first, first[-3000:]
        assert f"error: {remote.url}/shards/{missing} does not exist\n" in first
        assert 0 < len(logged(run_dir)) < STEPS

        # the shard is back, and the same command resumes the run
        remote.server.gone.clear()
        said = first + second + finish(words, remote)
    check(run_dir, expected, said, remote, most[0], limit)


def test_from_s3_two_ranks_train_on_the_same_samples_despite_faults(
    local: ShardSet, expected: dict[int, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, run_dir = tmp_path / "cache", tmp_path / "run"
    with behind("s3", local, monkeypatch) as remote, watched(cache) as most:
        words, limit = words_of(remote, local, cache, run_dir)
        said = finish(words, remote)
    check(run_dir, expected, said, remote, most[0], limit)


def test_the_credentials_of_a_url_are_used_and_never_written(
    local: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, password, signature = tmp_path / "run", "s3cret%2Fpass", "s1gned%3Dtoken"
    with behind("http", local, monkeypatch) as remote:
        url = f"{remote.url.replace('://', f'://user:{password}@')}?sig={signature}"
        words = command(
            url, run_dir, "monitor.tensorboard=true", "run.steps=2", f"data.cache.dir={tmp_path / 'cache'}",
            "data.cache.limit=10MB",
        )  # fmt: skip
        # another password is no change of the settings when the run is resumed
        for changes in ((), (f"data.shards={remote.url}", "run.steps=3")):
            ((code, out, errors),) = run_ranks([*words, *changes], 1)
            assert code == 0, errors[-3000:]
        assert set(logged(run_dir)) == {1, 2, 3}
        assert {path.partition("?")[2] for path, _ in remote.server.gets} == {f"sig={signature}", ""}
        assert isinstance(remote.server, FaultyServer) and len(set(remote.server.logins)) == 2
        remote.server.gone.add("/set/manifest.json")
        ((code, out, errors),) = run_ranks([*words, "run.steps=4"], 1)
        assert code == 2 and f"{remote.url}/manifest.json does not exist" in errors
        written = out + errors
    export(run_dir, tmp_path / "exported", to="safetensors")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "state.json"} <= {path.name for path in files}
    for secret in (password, signature, "s3cret", "s1gned"):
        assert secret not in written
        assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert f"shards: {remote.url}\n" in (run_dir / "config.yaml").read_text()


def test_an_unusable_cache_folder_is_an_error_before_torch_is_imported(
    local: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    (tmp_path / "file").touch()
    with behind("http", local, monkeypatch) as remote:
        words, _ = words_of(remote, local, tmp_path / "file" / "cache", tmp_path / "run")
        ((code, _, errors),) = run_ranks(words, 1)
    assert code == 2 and f"error: the cache folder {tmp_path / 'file' / 'cache'} cannot be used" in errors
    assert not re.search(r"\| +(torch|deepspeed)$", errors, re.MULTILINE)
