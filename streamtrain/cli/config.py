"""``streamtrain config``: print the reference of all settings."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from streamtrain.config.reference import explain, render_markdown, render_text
from streamtrain.errors import ConfigError

logger = logging.getLogger(__name__)

EXIT_USAGE = 2


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the command line."""
    parser = subparsers.add_parser("config", help="print all settings: default, range, meaning, resume rule")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--explain", metavar="KEY", help="only this setting or section, such as objective.koleo.weight")
    output.add_argument("--markdown", action="store_true", help="print docs/config.md")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the reference; return the exit code 0, or 2 for an unknown key."""
    try:
        if arguments.explain:
            text = explain(arguments.explain)
        else:
            text = render_markdown() if arguments.markdown else render_text()
    except ConfigError as error:
        logger.error("%s", error)
        return EXIT_USAGE
    print(text.rstrip("\n"))
    return 0
