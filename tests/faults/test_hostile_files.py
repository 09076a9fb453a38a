"""Files that somebody made to do harm: refused with an error of ours, in bounded memory and time; nothing is run."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from drawn_images import drawn_image, encoded
from ranks import ROOT

SCRIPT = Path(__file__).with_name("fuzz.py")
READERS = ("tar", "manifest", "index", "config", "checkpoint")
# 100 000 in all, and more
LONG = 25_000
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
# a process that may take so much more memory than it has once everything is imported
BOUNDED = """
import resource, sys
from pathlib import Path
from shards.packing import index_tars
from shards.format import images
from shards.packing import inputs
from shards.format import set_manifest as manifest
from shards.reading import shard_set
from shards import errors
from streamtrain import errors as ours
from streamtrain.config.load import read_resolved
from streamtrain.run.step_manifest import find_fault
work, path = sys.argv[1:]
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (256 << 20),) * 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    found = eval(work)
except (errors.ShardError, ours.StreamtrainError) as error:
    found = f"refused: {error}"
print(found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def fuzzed(reader: str, inputs: int, seed: int) -> dict[str, int]:
    words = [sys.executable, SCRIPT, reader, str(inputs), str(seed)]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    print(done.stdout, end="")
    return dict(json.loads(done.stdout))


def bounded(work: str, path: Path) -> str:
    """What comes of ``work``, an expression of ``path``; at most 100 MB of the memory are really used."""
    words = [sys.executable, "-c", BOUNDED, work, str(path)]
    done = subprocess.run(words, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-3000:]
    found, _, kilobytes = done.stdout.strip().rpartition(" ")
    assert int(kilobytes) < 100_000, (found, kilobytes)
    return found


@pytest.mark.parametrize("reader", READERS)
def test_some_hostile_files(reader: str) -> None:
    counts = fuzzed(reader, 200, 1)
    assert counts["taken"] and counts["refused"] and counts["taken"] + counts["refused"] == 200


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_many_hostile_files(reader: str) -> None:
    counts = fuzzed(reader, LONG, 2)
    # where the shapes that can be drawn are used up, there are fewer
    assert counts["taken"] and counts["refused"] and counts["taken"] + counts["refused"] > LONG // 2


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info


def sparse(path: Path, *parts: tuple[tarfile.TarInfo, bytes]) -> Path:
    """A tar whose members are as long as they say, mostly of zeros that take no disk."""
    with open(path, "wb") as file:
        for info, content in parts:
            start = file.write(info.tobuf(tarfile.GNU_FORMAT)) and file.tell()
            file.write(content)
            file.seek(start + max(0, -(-info.size // 512) * 512))
        file.truncate(file.tell() + 1024)
    return path


LARGE = 2 << 30
BOMBS: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "a header of 2 GB": (
        lambda p: sparse(p, (header("x", LARGE, tarfile.GNUTYPE_LONGNAME), b"a"), (header("a.jpg", 3), b"abc")),
        "index_tars.build_index(open(path, 'rb'), 'x.tar')", "refused: x.tar is damaged near byte",
    ),
    "an attribute of 2 GB": (
        lambda p: sparse(p, (header("x", LARGE, tarfile.XHDTYPE), b"9 a=b"), (header("a.jpg", 3), b"abc")),
        "inputs.list_inputs(path)", "is damaged near byte",
    ),
    "an image of 2 GB": (
        lambda p: sparse(p, (header("a.jpg", LARGE), b"\xff\xd8")),
        "index_tars.build_index(open(path, 'rb'), 'x.tar')", "'a.jpg' has 2147483648 bytes, more than 1073741824",
    ),
    "a label of 2 GB": (
        lambda p: sparse(p, (header("a.cls", LARGE), b"7"), (header("a.jpg", 3), b"abc")),
        "index_tars.build_index(open(path, 'rb'), 'x.tar').records['label']", "[-1]",
    ),
    "a member that leads back to itself": (
        lambda p: negative(p), "index_tars.build_index(open(path, 'rb'), 'x.tar')", "refused: x.tar is damaged at byte",
    ),
    "a manifest of 70 MB": (
        lambda p: written(folder(p) / "manifest.json", b"[" + b"[]," * 23_000_000 + b"0]").parent,
        "manifest.SetManifest.load(path)", "manifest.json cannot be read",
    ),
    "a manifest a million deep": (
        lambda p: written(folder(p) / "manifest.json", b"[" * 1_000_000).parent,
        "manifest.SetManifest.load(path)", "manifest.json cannot be read",
    ),
    "an index of a tera of records": (
        lambda p: written(p, npy_header("(1000000000000,)")), "shard_set.load_index(path)", "refused: index",
    ),
    "a checkpoint's manifest of 70 MB": (
        lambda p: written(folder(p) / "manifest.json", b" " * 70_000_000).parent, "find_fault(Path(path), contents=True)",
        "manifest.json is damaged",
    ),
    "nine lists of nine lists of ...": (
        lambda p: written(folder(p) / "config.yaml", laughs()).parent, "read_resolved(path)", "it has an alias",
    ),
    "a picture of 4 giga pixels": (
        lambda p: written(p, bomb()), "images.prepare(open(path, 'rb').read())", "refused: ",
    ),
}  # fmt: skip


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def negative(path: Path) -> Path:
    """Of minus 1024 bytes, which is where it began."""
    content = bytearray(header("a.jpg", 512).tobuf(tarfile.USTAR_FORMAT) + bytes(512))
    block = bytearray(header("b.jpg", 0).tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = b"\xff" + (256**11 - 1024).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return written(path, bytes(content + block + bytes(1024)))


def npy_header(shape: str) -> bytes:
    fields = "[('offset', '<u8'), ('length', '<u4'), ('crc32', '<u4'), ('width', '<u2'), ('height', '<u2'), "
    fields += "('label', '<i4'), ('flags', '<u2')]"
    text = f"{{'descr': {fields}, 'fortran_order': False, 'shape': {shape}, }}".ljust(245) + "\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode()


def laughs() -> bytes:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefghi", "bcdefghij", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    return ("\n".join(lines) + "\nrun: {dir: *j}\n").encode()


def bomb() -> bytes:
    """A PNG of 65000 x 65000 pixels, all of them there, in a few hundred bytes of each megabyte."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(bytes(8_126 * 6_500), 9) * 2
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 65_000, 65_000, 1, 0, 0, 0, 0)) + chunk(
        b"IDAT", rows
    ) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_takes_no_memory(name: str, tmp_path: Path) -> None:
    make, work, told = BOMBS[name]
    suffix = ".tar" if "GB" in name or "member" in name else ""
    assert told in bounded(work, make(tmp_path / f"bomb{suffix}"))


def test_names_that_lead_elsewhere_are_names_only(tmp_path: Path) -> None:
    picture = encoded(drawn_image(0, 12, 8))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("/etc/x.jpg", "../../y.jpg", "a/../../z.jpg"):
            tar.addfile(header(name, len(picture)), io.BytesIO(picture))
        for kind, name in ((tarfile.SYMTYPE, "s.jpg"), (tarfile.LNKTYPE, "h.jpg"), (tarfile.FIFOTYPE, "p.jpg")):
            info = header(name, 0, kind)
            info.linkname = "/etc/passwd"
            tar.addfile(info)
    (tmp_path / "in").mkdir()
    source = written(tmp_path / "in" / "hostile.tar", buffer.getvalue())
    for tool, words in (("make_shards.py", ["--workers", "1"]), ("index_shards.py", [])):
        out = tmp_path / tool
        done = subprocess.run(
            [sys.executable, ROOT / "tools" / tool, "--src", source, "--out", out, *words],
            env=ENVIRONMENT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0 and "3 images" in done.stdout, done.stdout + done.stderr
    with tarfile.open(tmp_path / "make_shards.py" / "shards" / "000000.tar") as tar:
        assert [member.name for member in tar if member.name.startswith((".", "/")) or ".." in member.name] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "index_shards.py", "make_shards.py"]


def test_a_manifest_cannot_name_files_elsewhere_or_start_a_command(tmp_path: Path) -> None:
    manifest = {"version": 1, "digest": "", "fingerprint": "", "classes": []}
    entry = {"name": "../../../etc/passwd", "bytes": 3, "samples": 1, "sha256": ""}
    told = bounded("manifest.SetManifest.load(path)", made(tmp_path / "a", {**manifest, "shards": [entry]}))
    assert told.endswith("'../../../etc/passwd' is not a valid tar name; copy the set again, or pack it again")
    piped = {**entry, "name": "0.tar", "url": f"pipe:touch {tmp_path / 'ran'}"}
    place = made(tmp_path / "b", {**manifest, "shards": [piped]})
    assert "refused" in bounded("shard_set.ShardSet.open(path).read(0, 0)", place)
    assert not (tmp_path / "ran").exists()


def made(path: Path, document: dict[str, object]) -> Path:
    """A set's folder with that manifest."""
    path.mkdir()
    from shards.format.set_manifest import SetManifest, ShardEntry

    entries = tuple(ShardEntry(**one) for one in document["shards"])  # type: ignore[attr-defined]
    document["digest"] = SetManifest(entries).digest
    (path / "manifest.json").write_text(json.dumps(document))
    return path
