"""Malicious files are refused with a one-line error in bounded memory and time, and execute nothing."""

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
REFUSING = ("tar", "manifest", "index", "config", "checkpoint", "image", "parquet", "weights")
# these skip damaged content
SKIPPING = ("metrics", "quarantine", "best", "maps")
READERS = (*REFUSING, *SKIPPING)
LONG = 10_000  # per reader
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
# a process limited to 256 MiB above its memory after imports
BOUNDED = """
import resource, sys
from pathlib import Path
from shards.packing import index_tars
from shards.format import images
from shards.packing import inputs
from shards.format import set_manifest as manifest
from shards.reading import shard_set
from shards.format import records
from shards import errors
from streamtrain import errors as streamtrain_errors
from streamtrain.config.load import read_resolved
from streamtrain.run.step_manifest import find_fault
work, path = sys.argv[1:]
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (256 << 20),) * 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    result = eval(work)
except (errors.ShardError, streamtrain_errors.StreamtrainError) as error:
    result = f"refused: {error}"
print(result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def run_fuzzer(reader: str, inputs: int, seed: int) -> dict[str, int]:
    words = [sys.executable, SCRIPT, reader, str(inputs), str(seed)]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    print(done.stdout, end="")
    return dict(json.loads(done.stdout))


def bounded(work: str, path: Path) -> str:
    """Return the result of ``work``, an expression of ``path``, and assert that it used less than 100 MB."""
    words = [sys.executable, "-c", BOUNDED, work, str(path)]
    done = subprocess.run(words, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-3000:]
    result, _, kilobytes = done.stdout.strip().rpartition(" ")
    assert int(kilobytes) < 100_000, (result, kilobytes)
    return result


@pytest.mark.parametrize("reader", READERS)
def test_some_hostile_files(reader: str) -> None:
    counts = run_fuzzer(reader, 200, 1)
    assert counts["accepted"] and counts["accepted"] + counts["refused"] == 200
    assert bool(counts["refused"]) == (reader in REFUSING)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_many_hostile_files(reader: str) -> None:
    counts = run_fuzzer(reader, LONG, 2)
    # hypothesis stops early once it has exhausted the inputs
    assert counts["accepted"] and counts["accepted"] + counts["refused"] > LONG // 2


def make_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info


def write_sparse_tar(path: Path, *parts: tuple[tarfile.TarInfo, bytes]) -> Path:
    """Write a tar whose members have their full size, as holes that take no disk space."""
    with open(path, "wb") as file:
        for info, content in parts:
            start = file.write(info.tobuf(tarfile.GNU_FORMAT)) and file.tell()
            file.write(content)
            file.seek(start + max(0, -(-info.size // 512) * 512))
        file.truncate(file.tell() + 1024)
    return path


LARGE = 2 << 30
SMALL_MEMBER = (make_header("a.jpg", 3), b"abc")
BOMBS: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "a header of 2 GB": (
        lambda p: write_sparse_tar(p, (make_header("x", LARGE, tarfile.GNUTYPE_LONGNAME), b"a"), SMALL_MEMBER),
        "index_tars.build_index(open(path, 'rb'), 'x.tar')", "refused: x.tar is damaged near byte",
    ),
    "an attribute of 2 GB": (
        lambda p: write_sparse_tar(p, (make_header("x", LARGE, tarfile.XHDTYPE), b"9 a=b"), SMALL_MEMBER),
        "inputs.list_inputs(path)", "is damaged near byte",
    ),
    "an image of 2 GB": (
        lambda p: write_sparse_tar(p, (make_header("a.jpg", LARGE), b"\xff\xd8")),
        "index_tars.build_index(open(path, 'rb'), 'x.tar')", "'a.jpg' has 2147483648 bytes, more than 1073741824",
    ),
    "a label of 2 GB": (
        lambda p: write_sparse_tar(p, (make_header("a.cls", LARGE), b"7"), SMALL_MEMBER),
        "index_tars.build_index(open(path, 'rb'), 'x.tar').records['label']", "[-1]",
    ),
    "a member of negative size": (
        lambda p: write_negative_size_tar(p),
        "index_tars.build_index(open(path, 'rb'), 'x.tar')", "refused: x.tar is damaged at byte",
    ),
    "a manifest of 70 MB": (
        lambda p: write_file(make_folder(p) / "manifest.json", b"[" + b"[]," * 23_000_000 + b"0]").parent,
        "manifest.SetManifest.load(path)", "manifest.json cannot be read",
    ),
    "a manifest nested a million deep": (
        lambda p: write_file(make_folder(p) / "manifest.json", b"[" * 1_000_000).parent,
        "manifest.SetManifest.load(path)", "manifest.json cannot be read",
    ),
    "an index of 10^12 records": (
        lambda p: write_file(p, make_npy_header("(1000000000000,)")), "records.load_index(path)", "refused: index",
    ),
    "a checkpoint's manifest of 70 MB": (
        lambda p: write_file(make_folder(p) / "manifest.json", b" " * 70_000_000).parent,
        "find_fault(Path(path), contents=True)", "manifest.json is damaged",
    ),
    "nested YAML aliases": (
        lambda p: write_file(make_folder(p) / "config.yaml", nested_aliases()).parent,
        "read_resolved(path)", "aliases such as",
    ),
    "an image of 4 gigapixels": (
        lambda p: write_file(p, image_bomb()), "images.prepare(open(path, 'rb').read())", "refused: ",
    ),
}  # fmt: skip


def write_file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def write_negative_size_tar(path: Path) -> Path:
    """Write a tar with a member of -1024 bytes, whose end is where it began."""
    content = bytearray(make_header("a.jpg", 512).tobuf(tarfile.USTAR_FORMAT) + bytes(512))
    block = bytearray(make_header("b.jpg", 0).tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = b"\xff" + (256**11 - 1024).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return write_file(path, bytes(content + block + bytes(1024)))


def make_npy_header(shape: str) -> bytes:
    fields = "[('offset', '<u8'), ('length', '<u4'), ('crc32', '<u4'), ('width', '<u2'), ('height', '<u2'), "
    fields += "('label', '<i4'), ('flags', '<u2')]"
    text = f"{{'descr': {fields}, 'fortran_order': False, 'shape': {shape}, }}".ljust(245) + "\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode()


def nested_aliases() -> bytes:
    """Return YAML whose aliases expand to 9^9 values (billion laughs)."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefghi", "bcdefghij", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    return ("\n".join(lines) + "\nrun: {dir: *j}\n").encode()


def image_bomb() -> bytes:
    """Return a small PNG file with 65000 x 65000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(bytes(8_126 * 6_500), 9) * 2
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 65_000, 65_000, 1, 0, 0, 0, 0))
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_uses_no_memory(name: str, tmp_path: Path) -> None:
    make, work, message = BOMBS[name]
    suffix = ".tar" if "GB" in name or "member" in name else ""
    assert message in bounded(work, make(tmp_path / f"bomb{suffix}"))


def test_member_paths_outside_the_set_are_not_followed(tmp_path: Path) -> None:
    picture = encoded(drawn_image(0, 12, 8))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("/etc/x.jpg", "../../y.jpg", "a/../../z.jpg"):
            tar.addfile(make_header(name, len(picture)), io.BytesIO(picture))
        for kind, name in ((tarfile.SYMTYPE, "s.jpg"), (tarfile.LNKTYPE, "h.jpg"), (tarfile.FIFOTYPE, "p.jpg")):
            info = make_header(name, 0, kind)
            info.linkname = "/etc/passwd"
            tar.addfile(info)
    (tmp_path / "in").mkdir()
    source = write_file(tmp_path / "in" / "hostile.tar", buffer.getvalue())
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


def test_a_manifest_cannot_name_outside_files_or_run_commands(tmp_path: Path) -> None:
    manifest = {"version": 1, "digest": "", "fingerprint": "", "classes": []}
    entry = {"name": "../../../etc/passwd", "bytes": 3, "samples": 1, "sha256": ""}
    folder = write_set_folder(tmp_path / "a", {**manifest, "shards": [entry]})
    message = bounded("manifest.SetManifest.load(path)", folder)
    assert message.endswith("'../../../etc/passwd' is not a valid tar name; copy the set again, or pack it again")
    piped = {**entry, "name": "0.tar", "url": f"pipe:touch {tmp_path / 'ran'}"}
    place = write_set_folder(tmp_path / "b", {**manifest, "shards": [piped]})
    assert "refused" in bounded("shard_set.ShardSet.open(path).read(0, 0)", place)
    assert not (tmp_path / "ran").exists()


def write_set_folder(path: Path, document: dict[str, object]) -> Path:
    """Write a set's folder with this manifest and a matching digest."""
    path.mkdir()
    from shards.format.set_manifest import SetManifest, ShardEntry

    entries = tuple(ShardEntry(**one) for one in document["shards"])  # type: ignore[attr-defined]
    document["digest"] = SetManifest(entries).digest
    (path / "manifest.json").write_text(json.dumps(document))
    return path
