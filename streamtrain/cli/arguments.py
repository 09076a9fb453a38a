"""Argument types and helpers that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.format.pixels import DTYPES, MAX_CHANNELS, RGB, PixelFormat
from streamtrain.config.data import MIN_PIXELS
from streamtrain.config.section import parse_bytes
from streamtrain.errors import StreamtrainError

_MIN_SIDE = 16


def add_command(subparsers: Any, name: str, summary: str, details: str, examples: str) -> argparse.ArgumentParser:
    """Add a subcommand whose help shows a summary, details and example command lines."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary[0].lower() + summary[1:].rstrip("."),
        description=f"{summary}\n\n{details}".rstrip(),
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def positive_int(text: str) -> int:
    # int() accepts no more than 4300 digits
    if not (text.isascii() and text.isdecimal() and len(text) < 20) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def non_negative_int(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def jpeg_quality(text: str) -> int:
    if (quality := positive_int(text)) > 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a JPEG quality from 1 to 100")
    return quality


def byte_size(text: str) -> int:
    """Parse a size such as ``64MB``, ``1GiB`` or ``256M``; a bare number is bytes, of at least a megabyte."""
    for candidate in (text, f"{text.strip()}B"):
        try:
            size = parse_bytes(candidate, min_bare=10**6)
        except ValueError as error:
            if "without a unit" in str(error):
                raise argparse.ArgumentTypeError(str(error)) from None
            continue
        if size >= 1:
            return size
    raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 64MB or 1GiB")


def max_side(text: str) -> int:
    """Parse the longer side of stored images in pixels."""
    if (side := positive_int(text)) < _MIN_SIDE:
        raise argparse.ArgumentTypeError(f"{side} pixels are less than one patch of a network; use {_MIN_SIDE} or more")
    return side


def max_pixels(text: str) -> int:
    """Parse the largest number of pixels of an image: width x height."""
    if (pixels := positive_int(text)) < MIN_PIXELS:
        raise argparse.ArgumentTypeError(f"{pixels} pixels is a tiny image; for megapixels, write {pixels}000000")
    return pixels


def add_pixel_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --channels and --dtype, which ``pixel_format`` reads."""
    parser.add_argument(
        "--channels", type=positive_int, default=RGB.channels, metavar="N",
        help="channels of all images (default: 3). With 3 channels of uint8, all images are converted to RGB",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default=RGB.dtype, help="type of the values (default: %(default)s)")


def pixel_format(arguments: argparse.Namespace) -> PixelFormat:
    if arguments.channels > MAX_CHANNELS:
        raise StreamtrainError(f"--channels {arguments.channels} is not a number from 1 to {MAX_CHANNELS}")
    return PixelFormat(arguments.channels, arguments.dtype)


@contextmanager
def writing(out: Path, option: str = "--out") -> Iterator[None]:
    """Raise StreamtrainError if the ``with`` block, which writes to ``out``, raises ``OSError``."""
    try:
        yield
    except OSError as error:
        raise StreamtrainError(f"cannot write {out} ({error.strerror or error}); choose another {option}") from None
