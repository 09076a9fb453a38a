"""The available memory is the smaller one of the machine's and the container's."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamtrain.run import host_memory
from streamtrain.run.host_memory import available_bytes


def test_container_limit_counts_inactive_file_cache_as_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "_machine_limit", lambda: 10**12)
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    assert available_bytes() == 10**12
    for name, text in (("max", "8000000"), ("current", "6000000"), ("stat", "anon 1\ninactive_file 1500000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert available_bytes() == 3_500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes() == 10**12


def test_unknown_without_either(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host_memory, "_machine_limit", lambda: None)
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    assert available_bytes() is None
