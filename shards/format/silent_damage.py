"""Damage over which Pillow decodes without a word: a JPEG whose data end early, a PNG whose checksums differ.

A JPEG decoder that meets the end of the data before the last row paints the rest grey and only warns, which Pillow does
not pass on. So the corner that is decoded last tells: where it is that very grey, the data are lengthened by noise, and
a picture that changes by that was not whole.
"""

from __future__ import annotations

import io
import re
import struct
import zlib

from PIL import Image

from shards.errors import ShardError

_JPEG_FORMATS = ("JPEG", "MPO")
_GREY = range(127, 130)  # what a block without coefficients decodes to, after any conversion of colours
_SEGMENT = re.compile(rb"\xff+([^\x00\xff])")
_END_OF_SCAN = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # arithmetic coders may leave out the end of their data
_SCAN, _END = 0xDA, 0xD9
_NOISE = bytes(37 * number % 251 for number in range(2048))  # without 0xFF, which would begin a marker
_NOISE_PIECES = 4
_PNG_HEADER_BYTES = 8


def check_whole(payload: bytes, image: Image.Image) -> None:
    """Find what decoding did not.

    Args:
        image: decoded from the payload, in any scale, not turned.

    Raises:
        ShardError: the payload is damaged, with the reason.
    """
    if image.format in _JPEG_FORMATS:
        _check_jpeg(payload, image)
    elif image.format == "PNG":
        _check_png(payload)


def _check_jpeg(payload: bytes, image: Image.Image) -> None:
    corner = image.getpixel((image.width - 1, image.height - 1))
    if not all(value in _GREY for value in (corner if isinstance(corner, tuple) else (corner,))):
        return
    longer = _with_noise(payload)
    if longer is not None and _coarse(payload) != _coarse(longer):
        raise ShardError("the image data end before the last row")


def _check_png(payload: bytes) -> None:
    """The checksums of the chunks that a picture needs, to the last one."""
    at = _PNG_HEADER_BYTES
    kind = b""
    while kind != b"IEND":
        length = int.from_bytes(payload[at : at + 4], "big")
        end = at + 8 + length
        kind = payload[at + 4 : at + 8]
        if end + 4 > len(payload):
            raise ShardError("the file ends before the image does")
        if kind[:1].isupper() and zlib.crc32(payload[at + 4 : end]) != struct.unpack_from(">I", payload, end)[0]:
            raise ShardError(f"the checksum of its {kind.decode('ascii', 'replace')} chunk differs")
        at = end + 4


def _coarse(payload: bytes) -> bytes:
    """The pixels of a JPEG at an eighth of its size, which only the first coefficient of each block decides."""
    with Image.open(io.BytesIO(payload)) as image:
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        return image.tobytes()


def _with_noise(payload: bytes) -> bytes | None:
    """The JPEG with noise at the end of every scan, which no decoder reads in a whole one; None where that differs."""
    pieces, at = [payload[:2]], 2
    while (found := _SEGMENT.match(payload, at)) is not None:
        marker = found[1][0]
        if marker == _END:
            return b"".join([*pieces, payload[at:]])
        length = int.from_bytes(payload[found.end() : found.end() + 2], "big")
        data = found.end() + length
        if marker & 0xF0 == 0xC0 and marker not in (0xC4, 0xC8, 0xCC, *_HUFFMAN_FRAMES):
            return None
        pieces.append(payload[at:data])
        at = data
        if marker == _SCAN:
            end = _END_OF_SCAN.search(payload, data)
            if end is None:
                return None
            at = end.start()
            restarts = _RESTART.findall(payload, data, at)
            following = restarts[-1][1] - 0xD0 + 1 if restarts else 0
            # Where a scan has restart markers, the decoder looks for the next of them before it reads on.
            noise = (_NOISE + bytes([0xFF, 0xD0 + (following + number) % 8]) for number in range(_NOISE_PIECES))
            pieces += [payload[data:at], *noise]
    return None
