"""Paths and links in the documentation exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md"])
PATH = re.compile(r"\b(?:tests|tools|streamtrain|shards|configs|docs)/[\w/.-]+\.(?:py|sh|md|yaml|cpp)\b")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = {path for path in PATH.findall(text) if not (ROOT / path).exists()}
    missing |= {link for link in LINK.findall(text) if not (page.parent / link).exists()}
    assert not missing


def test_validation_names_a_test_for_every_claim() -> None:
    rows = [line for line in (ROOT / "docs" / "validation.md").read_text(encoding="utf-8").splitlines()
            if line.startswith("| ") and not line.startswith("| claim")]  # fmt: skip
    assert len(rows) > 30
    assert not [row for row in rows if "`tests/" not in row]
