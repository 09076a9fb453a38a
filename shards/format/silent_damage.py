"""Detection of damage that Pillow ignores: JPEG data that end early, and PNG chunks with wrong checksums.

When the data end before the last row, a JPEG decoder fills the rest with grey and only issues a warning, which Pillow
drops. So if the last decoded pixel has exactly this grey, noise is appended to every scan and the image is decoded
again: if the pixels change, the data were incomplete.
"""

from __future__ import annotations

import io
import re
import struct
import zlib

from PIL import Image

from shards.errors import ShardError

_JPEG_FORMATS = ("JPEG", "MPO")
_GREY = range(127, 130)  # value of a block without coefficients, after any colour conversion
_SEGMENT = re.compile(rb"\xff+([^\x00\xff])")
_END_OF_SCAN = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # arithmetic coders may omit the end of their data
_SCAN, _END = 0xDA, 0xD9
_NOISE = bytes(37 * number % 251 for number in range(2048))  # without 0xFF, which would begin a marker
_NOISE_PIECES = 4
_PNG_HEADER_BYTES = 8


def check_integrity(payload: bytes, image: Image.Image) -> None:
    """Check for damage that decoding does not report.

    Args:
        image: decoded from the payload, at any scale, not rotated.

    Raises:
        ShardError: the payload is damaged; gives the reason.
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
    """Verify the checksums of all critical chunks, up to IEND."""
    offset = _PNG_HEADER_BYTES
    kind = b""
    while kind != b"IEND":
        length = int.from_bytes(payload[offset : offset + 4], "big")
        end = offset + 8 + length
        kind = payload[offset + 4 : offset + 8]
        if end + 4 > len(payload):
            raise ShardError("the file ends before the image does")
        if kind[:1].isupper() and zlib.crc32(payload[offset + 4 : end]) != struct.unpack_from(">I", payload, end)[0]:
            raise ShardError(f"the checksum of its {kind.decode('ascii', 'replace')} chunk differs")
        offset = end + 4


def _coarse(payload: bytes) -> bytes:
    """Return the pixels of a JPEG at 1/8 scale, which depend only on the first coefficient of each block."""
    with Image.open(io.BytesIO(payload)) as image:
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        return image.tobytes()


def _with_noise(payload: bytes) -> bytes | None:
    """Return the JPEG with noise at the end of each scan, skipped in a complete image; None if not supported."""
    pieces, offset = [payload[:2]], 2
    while (segment := _SEGMENT.match(payload, offset)) is not None:
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
            offset = end.start()
            restarts = _RESTART.findall(payload, data, offset)
            following = restarts[-1][1] - 0xD0 + 1 if restarts else 0
            # in a scan with restart markers, the decoder searches for the next marker before it continues
            noise = (_NOISE + bytes([0xFF, 0xD0 + (following + number) % 8]) for number in range(_NOISE_PIECES))
            pieces += [payload[data:offset], *noise]
    return None
