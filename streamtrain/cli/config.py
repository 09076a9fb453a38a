"""``streamtrain config``: print the reference of all settings."""

from __future__ import annotations

import argparse
from typing import Any

from streamtrain.config.reference import explain, render_markdown, render_text


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("config", help="print all settings: default, range, meaning, resume rule")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--explain", metavar="KEY", help="only this setting or section, such as objective.koleo.weight")
    output.add_argument("--markdown", action="store_true", help="print docs/config.md")


def run(arguments: argparse.Namespace) -> int:
    """Print the reference; raises ConfigError for an unknown key."""
    if arguments.explain:
        text = explain(arguments.explain)
    else:
        text = render_markdown() if arguments.markdown else render_text()
    print(text.rstrip("\n"))
    return 0
