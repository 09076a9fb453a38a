"""The fenced blocks of the documentation: their language, text, and whether they can run here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# script in tools/ -> the command that it calls
WRAPPERS = {
    f"tools/{path.name}": match[1]
    for path in sorted((ROOT / "tools").glob("*.py"))
    if (match := re.search(r'argv.insert\(1, "(\w+)"', path.read_text()))
}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->")


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str
    # why the block cannot run in a test, from a comment `<!-- not run: REASON -->` before it
    not_run: str | None
    # the file of a block of Python after "Save this as `FILE`"
    saved_as: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    reason = fence = saved_as = None
    language, start, text = "", 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if fence is None:
            if match := re.match(r"(\s*)```(\w*)$", line):
                fence, language, start, text = match[1], match[2], number, []
            elif match := _NOT_RUN.fullmatch(line.strip()):
                reason = match[1]
            elif line.strip():
                reason = None
                saved_as = match[1] if (match := re.search(r"Save this as `(\w+\.py)`", line)) else None
        elif line == f"{fence}```":
            yield Block(str(page.relative_to(ROOT)), start, language, "\n".join(text) + "\n", reason, saved_as)
            reason = fence = saved_as = None
        else:
            text.append(line.removeprefix(fence))


BLOCKS = [block for page in PAGES for block in read_blocks(page)]


def command_lines(text: str) -> Iterator[list[str]]:
    """Yield the words of each command of a shell script, without comments, redirections and what follows a pipe."""
    text = re.sub(r"<<'(\w+)'\n.*?\n\1\n", "\n", text, flags=re.DOTALL).replace("\\\n", " ")
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if set(word) <= set("|&;<>"):
                break
            words.append(word)
        if words:
            yield words
