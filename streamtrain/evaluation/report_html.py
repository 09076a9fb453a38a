"""The HTML of a report: one file with pictures and charts inside, without scripts, in light and dark mode.

All text is escaped here; charts are passed as finished SVG.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shards.errors import printable
from streamtrain.evaluation.charts import CHART_STYLE
from streamtrain.evaluation.verdict import Finding

# kinds of pictures that cannot contain scripts, by their first bytes
_PICTURE_KINDS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e26; --soft: #646874; --paper: #fff; --line: #dfe2e8; --card: #f6f7f9;
  --curve: #0072b2; --good: #0a7d4f; --bad: #c22f2f; --open: #8a6100; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ee; --soft: #9aa0ae; --paper: #14161b; --line: #31353f; --card: #1c1f26;
    --curve: #58b0ea; --good: #48c78e; --bad: #ff7b72; --open: #e3b341; }
  figure img { filter: brightness(.88); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 40px 24px 80px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 28px; line-height: 1.25; margin: 0; } h2 { font-size: 20px; margin: 48px 0 12px; }
p { margin: 8px 0 0; } .soft, figcaption { color: var(--soft); font-size: 14px; }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 20px; margin: 20px 0 0; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; }
.verdict { list-style: none; margin: 28px 0 0; padding: 0; display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.verdict li:not(.plain) { grid-column: 1 / -1; }
.verdict li { background: var(--card); border-left: 4px solid var(--mark); border-radius: 4px 8px 8px 4px;
  padding: 12px 16px; }
.verdict b { color: var(--mark); display: block; } .verdict li:first-child b { font-size: 20px; }
.good { --mark: var(--good); } .bad { --mark: var(--bad); } .open { --mark: var(--open); }
.plain { --mark: var(--soft); }
figure { margin: 0 0 24px; } figure img { display: block; max-width: 100%; height: auto; border-radius: 6px; }
figcaption { margin-top: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { text-align: right; padding: 6px 14px; border-bottom: 1px solid var(--line); font-weight: 400;
  white-space: nowrap; }
td:first-child, th:first-child { text-align: left; padding-left: 0; white-space: normal; min-width: 9em; }
th { color: var(--soft); font-size: 13px; }
.caption { margin: -6px 0 12px; }
.charts + details { margin-top: 24px; }
details { border-top: 1px solid var(--line); padding: 12px 0; } summary { cursor: pointer; font-weight: 600; }
summary span { color: var(--soft); font-weight: 400; } details[open] > summary { margin-bottom: 12px; }
pre { overflow: auto; max-height: 480px; background: var(--card); border-radius: 8px; padding: 16px; margin: 0;
  font-size: 13px; overflow-wrap: normal; }
@media (max-width: 560px) {
  body { padding: 24px 16px 56px; } .facts { grid-template-columns: minmax(0, 1fr); gap: 0; }
  .facts dt { font-size: 13px; } .facts dd { margin: 0 0 8px; }
}
"""


@dataclass(frozen=True)
class Picture:
    """An image on the page, with a caption below it."""

    content: bytes
    caption: str

    @property
    def kind(self) -> str | None:
        """``png``, ``jpeg``, or None for any other content, which is never shown."""
        return next((kind for start, kind in _PICTURE_KINDS.items() if self.content.startswith(start)), None)


@dataclass(frozen=True)
class Page:
    """Content of a report, from top to bottom.

    Attributes:
        facts: text by its name: recipe, data, hardware and so on.
        findings: the verdict; then ``numbers``, further sentences by title.
        charts: SVG figures always shown; ``more_charts`` are folded by topic.
        caption: of the charts; ``note`` is below them.
        tables: rows by title; the first row holds the column headers.
        texts: folded, by title.
    """

    title: str
    facts: Mapping[str, str]
    findings: Sequence[Finding]
    numbers: Mapping[str, str]
    charts: Sequence[str] = ()
    more_charts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    caption: str = ""
    note: str = ""
    pictures: Sequence[Picture] = ()
    tables: Mapping[str, list[list[str]]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


def render(page: Page) -> str:
    """Return the page as HTML."""
    facts = "".join(f"<dt>{_escape(name)}</dt><dd>{_escape(text)}</dd>" for name, text in page.facts.items())
    findings = "".join(_list_item(each.kind, each.title, each.text) for each in page.findings)
    findings += "".join(_list_item("plain", title, text) for title, text in page.numbers.items())
    parts = [
        f"<h1>{_escape(page.title)}</h1>",
        f'<dl class="facts">{facts}</dl>',
        f'<ul class="verdict">{findings}</ul>',
    ]
    if page.charts:
        caption = f'<p class="soft caption">{_escape(page.caption)}</p>' if page.caption else ""
        parts.append(f'<h2>Curves</h2>{caption}<div class="charts">{"".join(page.charts)}</div>')
    for topic, charts in page.more_charts.items():
        parts.append(_folded(topic, f"{len(charts)}", f'<div class="charts">{"".join(charts)}</div>'))
    parts += [f'<p class="soft">{_escape(page.note)}</p>'] if page.note else []
    if page.pictures:
        figures = (f"<figure>{_image(p)}<figcaption>{_escape(p.caption)}</figcaption></figure>" for p in page.pictures)
        parts.append(f"<h2>Pictures</h2>{''.join(figures)}")
    for name, (headers, *rows) in page.tables.items():
        head = "".join(f"<th>{_escape(cell)}</th>" for cell in headers)
        body = "".join(f"<tr>{''.join(f'<td>{_escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        parts.append(f'<h2>{_escape(name)}</h2><div class="scroll"><table><tr>{head}</tr>{body}</table></div>')
    if page.texts:
        parts.append("<h2>Details</h2>")
    parts += [_folded(name, "", f"<pre>{html.escape(text)}</pre>") for name, text in page.texts.items()]
    body = "\n".join(parts)
    # the empty icon keeps browsers from requesting one
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_escape(page.title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{_STYLE}{CHART_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _list_item(kind: str, title: str, text: str) -> str:
    return f'<li class="{kind}"><b>{_escape(title)}</b>{_escape(text)}</li>'


def _folded(title: str, count: str, content: str) -> str:
    count = f" <span>{count}</span>" if count else ""
    return f"<details><summary>{_escape(title)}{count}</summary>{content}</details>"


def _image(picture: Picture) -> str:
    data = base64.b64encode(picture.content).decode()
    return f'<img alt="{_escape(picture.caption)}" src="data:image/{picture.kind};base64,{data}">'


def _escape(text: str) -> str:
    """Return one line of text for HTML."""
    return html.escape(printable(text))
