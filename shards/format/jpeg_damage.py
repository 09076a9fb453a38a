"""Detect JPEG data that end early, which decoders accept.

When the data end before the last row, a JPEG decoder fills the rest with grey and only issues a warning, which Pillow
drops. So if the last decoded pixel has exactly this grey, noise is appended to every scan and the image is decoded
again: if the pixels change, the data were incomplete.
"""

from __future__ import annotations

import re

from PIL import Image

from shards.errors import ShardError
from shards.format.image_files import open_as

_GREY = range(127, 130)  # value of a block without coefficients, after any colour conversion
_SEGMENT = re.compile(rb"\xff+([^\x00\xff])")
# without fill bytes, since a long run of them would make the search quadratic
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # arithmetic coders may omit the end of their data
_SCAN, _END = 0xDA, 0xD9
_NOISE = bytes(37 * number % 251 for number in range(2048))  # without 0xFF, which would begin a marker
_NOISE_PIECES = 4
_MAX_SEGMENTS = 1 << 18


def check(payload: bytes, image: Image.Image) -> None:
    """Check a JPEG; ``image`` is decoded from it at any scale, not rotated.

    Raises:
        ShardError: the data end before the last row.
    """
    corner = image.getpixel((image.width - 1, image.height - 1))
    if not all(value in _GREY for value in (corner if isinstance(corner, tuple) else (corner,))):
        return
    longer = _with_noise(payload)
    if longer is not None and _coarse(payload) != _coarse(longer):
        raise ShardError("the image data end before the last row")


def _coarse(payload: bytes) -> bytes:
    """Return the pixels of a JPEG at 1/8 scale, which depend only on the first coefficient of each block."""
    image = open_as("JPEG", payload)
    image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
    return image.tobytes()


def _with_noise(payload: bytes) -> bytes | None:
    """Return the JPEG with noise at the end of each scan, skipped in a complete image; None if not supported."""
    pieces, offset = [payload[:2]], 2
    for _ in range(_MAX_SEGMENTS):
        segment = _SEGMENT.match(payload, offset)
        if segment is None:
            return None
        marker = segment[1][0]
        if marker == _END:
            return b"".join([*pieces, payload[offset:]])
        length = int.from_bytes(payload[segment.end() : segment.end() + 2], "big")
        data = segment.end() + length
        if marker & 0xF0 == 0xC0 and marker not in (0xC4, 0xC8, 0xCC, *_HUFFMAN_FRAMES):
            return None
        pieces.append(payload[offset:data])
        offset = data
        if marker == _SCAN:
            end = _END_OF_SCAN.search(payload, data)
            if end is None:
                return None
            offset = data + len(payload[data : end.start()].rstrip(b"\xff"))
            restarts = _RESTART.findall(payload, data, offset)
            following = restarts[-1][1] - 0xD0 + 1 if restarts else 0
            # in a scan with restart markers, the decoder searches for the next marker before it continues
            noise = (_NOISE + bytes([0xFF, 0xD0 + (following + number) % 8]) for number in range(_NOISE_PIECES))
            pieces += [payload[data:offset], *noise]
    return None
