"""Counts of the files that a reader passed over, for its report."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field

from PIL import features

_SHOWN_SUFFIXES = 8
_LONGEST_SUFFIX = 12  # characters; a longer one is part of a name
_HIDDEN = "hidden files, such as ._NAME of macOS, passed over"
_NO_SUFFIX = "no suffix"
# for formats that phones and web pages use
_HEIC_ADVICE = "HEIC is not supported; convert the files to JPEG"
_AVIF_ADVICE = "AVIF needs Pillow 11.3 or newer with libavif; update Pillow or convert the files"
_ADVICE = {
    ".heic": _HEIC_ADVICE,
    ".heif": _HEIC_ADVICE,
    ".jxl": "JPEG XL is not supported; convert the files to JPEG",
    ".avif": _AVIF_ADVICE,
    ".npy": ".npy files are images only with --channels and --dtype",
    ".dcm": "DICOM files are images only with --channels 1 and --dtype",
}


def is_hidden(name: str) -> bool:
    """Return whether the file of a name or one of its folders is hidden: its name begins with a dot, or is macOS's."""
    if "." not in name[:1] and "/." not in name and "__MACOSX" not in name:
        return False
    return any((part[:1] == "." and part not in (".", "..")) or part == "__MACOSX" for part in name.split("/"))


@dataclass
class Tally:
    """Counts of files and labels that a reader passed over.

    Attributes:
        suffixes: files of other kinds, by the lower-case suffix of their names.
        reasons: everything else, by a phrase that completes "...: COUNT".
    """

    suffixes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def add_file(self, name: str) -> None:
        """Count a file that is not an image, by its suffix, or as hidden."""
        if is_hidden(name):
            self.reasons[_HIDDEN] += 1
            return
        base = name.rpartition("/")[2]
        suffix = os.path.splitext(base)[1].lower()
        self.suffixes[suffix if 1 < len(suffix) <= _LONGEST_SUFFIX else _NO_SUFFIX] += 1

    def add(self, reason: str, count: int = 1) -> None:
        if count:
            self.reasons[reason] += count

    def merge(self, other: Tally) -> None:
        self.suffixes.update(other.suffixes)
        self.reasons.update(other.reasons)

    @property
    def num_files(self) -> int:
        """Number of files that are not images, hidden ones included."""
        return self.suffixes.total() + self.reasons[_HIDDEN]

    def clauses(self) -> str:
        """Return ``lines`` as the end of a message: each after a semicolon."""
        return "".join(f"; {line}" for line in self.lines())

    def lines(self) -> list[str]:
        """Return one line per reason, and one for all suffixes; empty if nothing was passed over."""
        lines = []
        if self.suffixes:
            ranked = sorted(self.suffixes.items(), key=lambda pair: (-pair[1], pair[0]))
            shown = [f"{suffix} {count}" for suffix, count in ranked[:_SHOWN_SUFFIXES]]
            if others := sum(count for _, count in ranked[_SHOWN_SUFFIXES:]):
                shown.append(f"other suffixes {others}")
            lines.append(f"files of other kinds, passed over: {', '.join(shown)}")
        for text in dict.fromkeys(text for suffix, text in _ADVICE.items() if self.suffixes[suffix]):
            if not (text == _AVIF_ADVICE and features.check("avif")):
                lines.append(text)
        return lines + [f"{reason}: {count}" for reason, count in sorted(self.reasons.items()) if count]
