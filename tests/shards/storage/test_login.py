"""A store without a login is an error at once, not after the retries."""

from __future__ import annotations

import time
from pathlib import Path

import fsspec
import pytest

from shards.errors import ShardError
from shards.storage.store import RetryPolicy, Store


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({}, "Unable to locate credentials"),
        ({"AWS_PROFILE": "nobody"}, "nobody"),
        ({"AWS_ACCESS_KEY_ID": "key"}, "AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_s3_without_a_login_fails_at_once(
    variables: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    # no files, no login from the machine itself
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "missing"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # without the clients and the logins of earlier tests
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    started = time.monotonic()
    with pytest.raises(ShardError, match=r"^s3://unused/set/object may not be accessed") as raised:
        store = Store("s3://unused/set", RetryPolicy(deadline_seconds=120, first_pause_seconds=60))
        store.load("object", bytes)
    assert reason in str(raised.value) and "FSSPEC_S3_ANON=true" in str(raised.value)
    # a retry would have waited for half a minute at least
    assert time.monotonic() - started < 20
