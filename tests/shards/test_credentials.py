"""No credential of a URL is left in texts and values that are shown or written."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
from drawn_images import packed_set
from faulty_server import faulty_server
from hypothesis import given
from hypothesis import strategies as st

from shards.credentials import add_netrc_login, strip_credentials, strip_from_text, strip_values
from shards.errors import ShardError
from shards.packing.index_tars import index_tars
from shards.packing.inputs import list_inputs
from shards.reading.shard_set import ShardSet
from shards.storage.store import RetryPolicy, Store

# what RFC 3986 permits in user info and query, apart from percent signs that start no code
_PERMITTED = string.ascii_letters + string.digits + "-._~!$&'()*+,;=:"
_SECRETS = st.text(_PERMITTED + "%", min_size=1).map(lambda text: "SECRET" + text.replace("%", "%2F") + "SECRET")
_SCHEMES = st.sampled_from(["http", "https", "HTTPS", "s3", "sftp", "simplecache::https"])
_PATHS = st.text(string.ascii_letters + string.digits + "/._-%@", max_size=20).map(lambda path: f"/set{path}")
_FRAMES = st.sampled_from(
    ["{}", "'{}'", "({}),", "reading {}: failed", "url={!r}", "[{}]\n{}", "\t{}\t", '{{"a":"{}"}}']
)


@given(
    scheme=_SCHEMES,
    user=st.none() | st.just("user"),
    secret=_SECRETS,
    path=_PATHS,
    frame=_FRAMES,
    as_query=st.booleans(),
)
def test_no_secret_is_left(scheme: str, user: str | None, secret: str, path: str, frame: str, as_query: bool) -> None:
    login = "" if as_query else f"{user or ''}:{secret}@"
    url = f"{scheme}://{login}host{path}" + (f"?sig={secret}" if as_query else "")
    text = frame.replace("{!r}", "{0!r}").replace("{}", "{0}").format(url)
    for shown in (
        strip_credentials(url),
        strip_from_text(text),
        str(ShardError(text)),
        str(strip_values([{"a": url}])),
    ):
        assert "SECRET" not in shown
    assert strip_credentials(url).endswith(f"host{path}") and f"host{path}" in strip_from_text(text)
    assert strip_credentials(strip_credentials(url)) == strip_credentials(url)


def test_tokens_without_a_password_are_secret_over_http_only() -> None:
    assert strip_credentials("https://token@host/set") == "https://host/set"
    assert strip_credentials("abfs://container@account.dfs.core.windows.net/set").startswith("abfs://container@account")
    assert strip_credentials("sftp://me:word@host/set") == "sftp://me@host/set"
    for same in ("sets/a?b#c", "/data/x@y:z", "hf://datasets/owner/name@main/data", "s3://bucket/set", ""):
        assert strip_credentials(same) == strip_from_text(same) == same


def test_the_login_of_a_host_is_taken_from_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine host login me password a/b\ndefault login other password other\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert add_netrc_login("http://host:80/set") == "http://me:a%2Fb@host:80/set"
    for same in ("http://elsewhere/set", "http://you:own@host/set"):
        assert add_netrc_login(same) == same
    netrc.write_text("machine")
    assert add_netrc_login("http://host/set") == "http://host/set"


def test_logins_and_queries_are_sent_to_their_own_server_only(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "small").write_bytes(b"content")
    with faulty_server(tmp_path) as server, faulty_server(tmp_path) as other:
        url = server.url.replace("://", "://me:word@") + "/set?sig=token"
        store = Store(url, RetryPolicy(5.0, 2.0, 0.01, 0.05))
        assert store.load("small", bytes) == b"content" and store.read("small", 1, 3) == b"on"
        assert server.logins == ["Basic bWU6d29yZA=="] * 2
        assert {path for path, _ in server.gets} == {"/set/small?sig=token"}
        server.faults = [f"to {other.url}/set/small"] * 2
        assert store.load("small", bytes) == b"content" and store.read("small", 1, 3) == b"on"
        assert other.logins == [None, None] and {path for path, _ in other.gets} == {"/set/small"}


def test_packing_and_indexing_write_no_credentials(tmp_path: Path) -> None:
    local = packed_set(tmp_path / "origin", 4)
    with faulty_server(local.path) as server:
        url = server.url.replace("://", "://me:word@")
        index_tars([f"{url}/shards/{local.name(0)}"], tmp_path / "indexed")
        (entry,) = json.loads((tmp_path / "indexed" / "manifest.json").read_text())["shards"]
        assert entry["url"] == f"{server.url}/shards/{local.name(0)}"
        assert ShardSet.open(tmp_path / "indexed").read(0, 1) == local.read(0, 1)
        with pytest.raises(ShardError, match=r"\?\.\.\. has a query, which is never stored"):
            index_tars([f"{url}/shards?sig=token"], tmp_path / "other")
    (tmp_path / "list.txt").write_text(f"{url}/a.jpg?sig=token\n{url}/a.jpg?sig=other\n")
    inputs = list_inputs(str(tmp_path / "list.txt"))
    assert [item.name for item in inputs.items] == [f"{server.url}/a.jpg"] * 2
    assert inputs.items[0].location.identity != inputs.items[1].location.identity
