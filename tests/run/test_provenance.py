"""Digest of the source code."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import ROOT

from streamtrain.run import provenance


def test_the_digest_depends_on_every_source_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    packages = [path for name in ("shards", "streamtrain") for path in (ROOT / name).rglob("*")]
    names = [path.relative_to(ROOT) for path in packages if path.suffix in (".py", ".cpp", ".h")]
    digests = {provenance.program_versions()["code"]}
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
        digests.add(provenance.program_versions()["code"])
    assert len(digests) == len(names) + 1
