"""Paths with ``~`` and variables."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import ShardError
from shards.storage.paths import expand_path

USER = pwd.getpwuid(os.getuid())
WORDS = st.sampled_from(
    ["~", "~x", "a", "$", "$A", "${B}", "$C", "${}", "$9", "{", "}", ".", "", "a~", "$$", "s3:", "é"]
)
VALUES = st.sampled_from(["", "/data", "~", "~/b", "$A", "$B/c", "${C}", "s3://b", "$A$A", "plain", "x/~/y"])


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/people/me")
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.delenv("UNSET", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sets/a", "sets/a"),
        ("", ""),
        ("~", "/people/me"),
        ("~/a b", "/people/me/a b"),
        (f"~{USER.pw_name}/x", f"{USER.pw_dir}/x"),
        ("$DATA/set", "/data/set"),
        ("${DATA}_2/set", "/data_2/set"),
        ("a/$DATA", "a//data"),
        ("cost$/5", "cost$/5"),
        ("backup~/x~", "backup~/x~"),
        ("s3://b/~/$UNSET", "s3://b/~/$UNSET"),
        ("file://~/x", "file://~/x"),
        ("pipe:cat $UNSET", "pipe:cat $UNSET"),
    ],
)
def test_home_and_variables_are_expanded_and_urls_are_not(text: str, expected: str) -> None:
    assert expand_path(text) == expected


def test_the_value_of_a_variable_is_expanded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASE", "~/base")
    monkeypatch.setenv("SET", "$BASE/set")
    monkeypatch.setenv("BUCKET", "s3://bucket/~")
    assert expand_path("$SET/x") == "/people/me/base/set/x"
    assert expand_path("$BUCKET/set") == "s3://bucket/~/set"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("$UNSET/set", "the environment variable UNSET, which is not set"),
        ("${UN SET}", "UN SET"),
        ("${}/x", "not set"),
        ("~not-a-user/x", "no user not-a-user"),
        ("here/~/x", "contains a folder called ~"),
        ("/~", "contains a folder"),
    ],
)
def test_a_path_that_cannot_be_expanded_names_the_cause(text: str, reason: str) -> None:
    with pytest.raises(ShardError, match=reason):
        expand_path(text)


def test_variables_that_contain_each_other_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A", "$B$B")
    monkeypatch.setenv("B", "$A$A")
    with pytest.raises(ShardError, match="refer to each other"):
        expand_path("$A")


def test_an_existing_file_whose_name_looks_like_a_variable_is_used_as_it_is() -> None:
    for name in ("price$UNSET.jpg", "~$draft.jpg"):
        Path(name).touch()
        assert expand_path(name) == name


@given(st.lists(WORDS, max_size=6), st.booleans(), VALUES, VALUES, VALUES)
def test_expansion_is_final(words: list[str], joined: bool, a: str, b: str, c: str) -> None:
    """An expanded path stays the same, so that a saved configuration can be read again."""
    text = ("" if joined else "/").join(words)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"A": a, "B": b, "C": c, "HOME": "/people/me"}.items():
            patch.setenv(name, value)
        try:
            expanded = expand_path(text)
        except ShardError as error:
            assert "\n" not in str(error)
            return
        assert expand_path(expanded) == expanded
        if "://" not in expanded:
            assert "~" not in expanded.split("/") and not any(f"${name}" in expanded for name in "ABC")
