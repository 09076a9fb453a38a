"""Fuzz a reader of untrusted files: ``fuzz.py READER INPUTS SEED``; prints the number of accepted and refused inputs.

A reader may accept an input or raise ``ShardError`` or ``StreamtrainError``. Any other exception ends this process with
a traceback and the input, as do ten CPU seconds on one input and ``ROOM_BYTES`` of additional memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import resource
import signal
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from drawn_images import drawn_image, encoded
from faults import fuzz_images, fuzz_run_files
from faults.mutations import JSON, NUMBERS, TEXTS, mutate_bytes, mutate_document
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from shards.errors import ShardError
from shards.format.index import build_index, make_dali_index
from shards.format.records import RECORD, load_index, open_bytes, save_index
from shards.format.set_manifest import SetManifest
from shards.packing.index_tars import index_tars
from shards.packing.inputs import list_inputs
from shards.reading.shard_set import ShardSet
from streamtrain.checkpoint.reader import open_checkpoint
from streamtrain.checkpoint.writer import write_fragments
from streamtrain.config.load import build as build_config
from streamtrain.config.load import merge, parse_override, preset_folders, read_raw, to_yaml
from streamtrain.errors import StreamtrainError
from streamtrain.run.atomic_io import compute_checksum
from streamtrain.run.directory import saved_state
from streamtrain.run.resume_policy import build_provenance, check_resume
from streamtrain.run.step_manifest import MANIFEST_NAME, CheckpointManifest, find_fault

ROOM_BYTES = 512 << 20
BLOCK = tarfile.BLOCKSIZE
HERE = Path(tempfile.mkdtemp(prefix="fuzz-"))
NAMES = ["a.jpg", "a.cls", "folder/b.png", "folder/b.json", f"{'n' * 60}/{'m' * 90}.webp"]


def make_tar(form: int) -> bytes:
    """Return a small WebDataset tar in one of the formats of ``tarfile``."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for number, name in enumerate(NAMES):
            kinds = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
            kind = kinds.get(name.rpartition(".")[2])
            content = encoded(drawn_image(number, 12, 8), kind) if kind else b"3"
            header = tarfile.TarInfo(name)
            header.size = len(content)
            if form == tarfile.PAX_FORMAT:
                header.pax_headers = {"comment": "größe", "mtime": "1.5"}
            tar.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


TARS = [make_tar(form) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
# offset and length of the header fields
FIELDS = {"name": (0, 100), "mode": (100, 8), "size": (124, 12), "type": (156, 1), "link": (157, 100)}
FIELDS |= {"magic": (257, 8), "prefix": (345, 155), "sparse": (386, 97), "extended": (482, 13)}
PAX_KEYS = ["size", "path", "linkpath", "hdrcharset", "GNU.sparse.map", "GNU.sparse.major", "GNU.sparse.minor"]
PAX_KEYS += ["GNU.sparse.size", "GNU.sparse.name", "GNU.sparse.numblocks", "GNU.sparse.realsize", "uid", "mtime"]


def encode_number(value: int, length: int) -> bytes:
    """Encode in octal if it fits, else in signed base 256."""
    text = b"%o" % value if value >= 0 else b""
    if text and len(text) < length:
        return text.rjust(length - 1, b"0") + b"\0"
    return (b"\x80" if value >= 0 else b"\xff") + (value % 256 ** (length - 1)).to_bytes(length - 1, "big")


def mutate_header(draw: Callable[..., Any], content: bytes) -> bytes:
    """Put a hostile value into one header field and update the header checksum."""
    starts = [at for at in range(0, len(content) - BLOCK + 1, BLOCK) if content[at + 257 : at + 262] == b"ustar"]
    if not starts:
        return content
    at = draw(st.sampled_from(starts))
    header = bytearray(content[at : at + BLOCK])
    name = draw(st.sampled_from(sorted(FIELDS)))
    first, length = FIELDS[name]
    if name == "size":
        new = encode_number(draw(NUMBERS), length)
    elif name == "type":
        new = draw(st.sampled_from([bytes([code]) for code in b"0123456\x007LKxgSXMVDN"]))
    else:
        new = draw(TEXTS).encode(errors="surrogatepass")[:length].ljust(length, b"\0")
    header[first : first + length] = new[:length]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % (sum(header) % 8**6)
    return content[:at] + bytes(header) + content[at + BLOCK :]


def insert_pax_header(draw: Callable[..., Any], content: bytes) -> bytes:
    """Insert a generated PAX header before a member."""
    records = b""
    for key in draw(st.lists(st.sampled_from(PAX_KEYS), min_size=1, max_size=4)):
        value = str(draw(NUMBERS)) if draw(st.booleans()) else draw(TEXTS)
        record = f" {key}={value}\n".encode(errors="surrogatepass")
        length = draw(st.integers(0, 3)) * 7 if draw(st.integers(0, 9)) == 0 else len(record) + len(str(len(record)))
        records += str(length).encode() + record
    header = tarfile.TarInfo("pax")
    header.type, header.size = draw(st.sampled_from([b"x", b"g"])), len(records)
    block = header.tobuf(tarfile.USTAR_FORMAT) + records.ljust(-(-len(records) // BLOCK) * BLOCK, b"\0")
    at = draw(st.integers(0, len(content) // BLOCK)) * BLOCK
    return content[:at] + block * draw(st.sampled_from([1, 1, 1, 3, 40])) + content[at:]


@st.composite
def tars(draw: Callable[..., Any]) -> bytes:
    content: bytes = draw(st.sampled_from(TARS))
    for _ in range(draw(st.integers(1, 3))):
        content = draw(st.sampled_from([mutate_bytes, mutate_header, mutate_header, insert_pax_header]))(draw, content)
    return content


def read_tar(content: bytes) -> None:
    index = build_index(io.BytesIO(content), "x.tar")
    for record in index.records:
        assert 0 <= int(record["offset"]) + int(record["length"]) <= len(content)
    (HERE / "x.tar").write_bytes(content)
    try:
        list_inputs(str(HERE / "x.tar"))
    finally:
        make_dali_index(index.samples)


MANIFEST = {
    "version": 1, "num_samples": 5, "num_bytes": 20_000, "digest": "", "fingerprint": "f", "classes": ["a", "b"],
    "shards": [
        {"name": f"{number:06d}.tar", "bytes": 10_000, "samples": 5, "sha256": "0" * 64, "url": ""} for number in (0, 1)
    ],
}  # fmt: skip


@st.composite
def manifests(draw: Callable[..., Any]) -> bytes:
    document = mutate_document(draw, MANIFEST)
    if draw(st.integers(0, 3)):  # usually with a matching digest
        try:
            stream = json.dumps([[one["name"], one["samples"], one["sha256"]] for one in document["shards"]])
            document["digest"] = hashlib.sha256(stream.encode()).hexdigest()[:32]
        except (KeyError, TypeError):
            pass
    content = json.dumps(document).encode()
    return mutate_bytes(draw, content) if draw(st.integers(0, 3)) == 0 else content


def read_manifest(content: bytes) -> None:
    manifest = SetManifest.parse(content, "manifest.json")
    shard_set = ShardSet(HERE, manifest)
    assert int(shard_set.sizes.sum()) == manifest.num_samples >= 0 <= manifest.num_bytes
    for number, entry in enumerate(manifest.shards):
        assert shard_set.index_path(number).parent == HERE / "index"
        assert entry.url or shard_set.tar_path(number).parent == HERE / "shards"
    str(manifest.extent), shard_set.digest, shard_set.is_remote


def make_small_set() -> ShardSet:
    (HERE / "tars").mkdir()
    (HERE / "tars" / "0.tar").write_bytes(TARS[0])
    index_tars([str(HERE / "tars")], HERE / "set")
    return ShardSet.open(HERE / "set")


@st.composite
def indexes(draw: Callable[..., Any]) -> bytes:
    content = INDEX
    if draw(st.booleans()):
        records = RECORDS.copy()
        for _ in range(draw(st.integers(1, 3))):
            field = draw(st.sampled_from(RECORD.names))
            bounds = np.iinfo(RECORD[field])
            records[draw(st.integers(0, 2))][field] = draw(st.integers(int(bounds.min), int(bounds.max)))
        if draw(st.booleans()):
            return INDEX[:START] + records.tobytes()  # as earlier versions wrote it, without checksums
        save_index(records, HERE / "changed.npy")
        return (HERE / "changed.npy").read_bytes()
    if draw(st.booleans()):
        header = draw(st.sampled_from([
            "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
            "{'descr': '<u8', 'fortran_order': False, 'shape': (1000000000000,), }",
            "{'descr': [('a', '<u8')], 'fortran_order': True, 'shape': (-1,), }",
            "(" * 3000, "[" * 9000, "{'descr': __import__('os').getpid(), 'fortran_order': False, 'shape': (3,), }",
        ]))  # fmt: skip
        length = draw(st.sampled_from([len(header), 65535, 0]))
        return (
            b"\x93NUMPY"
            + draw(st.sampled_from([b"\1\0", b"\2\0", b"\3\0", b"\7\0"]))
            + (length.to_bytes(2, "little") + header.encode())
        )
    return mutate_bytes(draw, content)


def read_index(content: bytes) -> None:
    path = HERE / "set" / "index" / SET.manifest.shards[0].index_name
    path.write_bytes(content)
    errors = 0
    for load in (lambda: open_bytes(content, "x.npy").records(), lambda: load_index(path)):
        try:
            assert load().dtype == RECORD
        except ShardError:
            errors += 1
    assert errors in (0, 2)
    again = ShardSet(SET.path, SET.manifest)
    for sample in range(3):
        again.key(0, sample)
        again.read(0, sample)


CONFIGS = [path.read_text() for folder in preset_folders() for path in sorted(folder.glob("*.yaml"))]
VALUES = [yaml.safe_load(text) for text in CONFIGS if "extends" not in text]


DEEP = "[" * 3000


@st.composite
def configs(draw: Callable[..., Any]) -> bytes:
    kind = draw(st.sampled_from(["text", "value", "value", "value", "override"]))
    if kind == "text":
        spliced = draw(
            st.sampled_from(["&a ", "*a", "!!python/object/apply:os.getpid []", "<<: ", "? ", "{", DEEP, "\nextends: "])
        )
        text = draw(st.sampled_from(CONFIGS))
        at = draw(st.integers(0, len(text)))
        return mutate_bytes(draw, (text[:at] + spliced + text[at:]).encode())
    if kind == "value":
        value = mutate_document(draw, draw(st.sampled_from(VALUES)))
        return yaml.safe_dump(value, allow_unicode=draw(st.booleans())).encode(errors="surrogatepass")
    section = draw(st.sampled_from(["run.steps", "data.shards", "crops.sizes", "schedules.lr", "optim.betas", "x.y"]))
    return b"OVERRIDE" + f"{section}={draw(JSON)}".encode(errors="surrogatepass")


def read_config(content: bytes) -> None:
    if content.startswith(b"OVERRIDE"):
        raw = merge({}, parse_override(content[8:].decode(errors="surrogateescape")))
    else:
        (HERE / "c.yaml").write_bytes(content)
        raw = read_raw(HERE / "c.yaml")
    config = build_config(raw)
    (HERE / "again.yaml").write_text(to_yaml(config), encoding="utf-8", errors="surrogatepass")
    config.batch_split(1)


def make_checkpoint() -> dict[str, bytes]:
    """Return the files of a small intact checkpoint."""
    folder = HERE / "made"
    folder.mkdir()
    state = {"version": 2, "step": 3, "world_size": 1, "shapes": {"a": [3, 2]}, "skipped_steps": 0}
    state["data"] = {"version": 1, "digest": "x", "seed": 0, "lane_block": 1, "next_slot": 24}
    state |= build_provenance(build_config({}), "fp32")
    (folder / "state.json").write_text(json.dumps(state))
    write_fragments(folder / "rank-00000-of-00001.safetensors", {"master/a": _Shard()})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class _Shard:
    numel = 6

    def read(self) -> Any:
        import torch

        return torch.arange(6.0)


@st.composite
def checkpoints(draw: Callable[..., Any]) -> dict[str, bytes]:
    files = dict(CHECKPOINT)
    name = draw(st.sampled_from(sorted(files)))
    if name.endswith(".json") and draw(st.integers(0, 3)):
        files[name] = json.dumps(mutate_document(draw, json.loads(files[name]))).encode()
    elif name.endswith(".safetensors") and draw(st.integers(0, 3)):
        size = int.from_bytes(files[name][:8], "little")
        header = json.dumps(mutate_document(draw, json.loads(files[name][8 : 8 + size]))).encode()
        files[name] = len(header).to_bytes(8, "little") + header + files[name][8 + size :]
    else:
        files[name] = mutate_bytes(draw, files[name])
    # files with matching checksums get past the first check
    files["sealed"] = b"x" * draw(st.integers(0, 3))
    if draw(st.integers(0, 4)) == 0:
        entries = {name: {"bytes": 5, "crc32": "0a1b2c3d"}, "../../x": {"bytes": 0, "crc32": "0"}}
        entries = mutate_document(draw, entries)
        text = json.dumps({"files": entries, "crc32": f"{zlib.crc32(json.dumps(entries).encode()):08x}"})
        files[MANIFEST_NAME] = text.encode()
    return files


def read_checkpoint(files: dict[str, bytes]) -> None:
    run = HERE / "run"
    folder = run / "checkpoints" / "step-000000003"
    folder.mkdir(parents=True, exist_ok=True)
    files, sealed = dict(files), bool(files["sealed"])
    parts = ("state.json", "rank-00000-of-00001.safetensors")
    for name in parts:
        (folder / name).write_bytes(files[name])
    if sealed or MANIFEST_NAME not in files:
        CheckpointManifest({name: compute_checksum(folder / name) for name in parts}).write(folder)
    else:
        (folder / MANIFEST_NAME).write_bytes(files[MANIFEST_NAME])
    find_fault(folder, contents=True)
    refused, saved = None, saved_state(folder)
    for accepted in ((), ("*",)) if saved is not None else ():
        try:
            check_resume(build_config({"run": {"dir": str(run)}}), folder, saved, 1, accepted)
        except StreamtrainError as error:
            refused = error
    with open_checkpoint(folder) as reader:
        for name in reader.state["shapes"]:
            reader.read_full(f"master/{name}")
        reader.step, reader.has("x")
    if refused:
        raise refused


READERS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "tar": (tars, read_tar),
    "manifest": (manifests, read_manifest),
    "index": (indexes, read_index),
    "config": (configs, read_config),
    "checkpoint": (checkpoints, read_checkpoint),
    **fuzz_images.READERS,
    **fuzz_run_files.READERS,
}
SET = make_small_set()
RECORDS = np.array([SET.record(0, number) for number in range(3)], RECORD)
save_index(RECORDS, HERE / "index.npy")
INDEX = (HERE / "index.npy").read_bytes()
START = INDEX.index(RECORDS.tobytes())
CHECKPOINT = make_checkpoint()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main() -> None:
    reader, inputs, first = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    strategy, read = READERS[reader]
    counts = {"accepted": 0, "refused": 0}
    signal.signal(signal.SIGPROF, lambda number, frame: sys.exit("an input took more than ten seconds"))

    @seed(first)
    @settings(
        max_examples=inputs, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    @given(strategy())
    def feed(content: Any) -> None:
        # CPU time, because the machine may be busy
        signal.setitimer(signal.ITIMER_PROF, 10.0)
        try:
            read(content)
            counts["accepted"] += 1
        except (ShardError, StreamtrainError) as error:
            counts["refused"] += 1
            assert "\n" not in str(error)
        signal.setitimer(signal.ITIMER_PROF, 0.0)

    room = resident_bytes() + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    feed()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"reader": reader, **counts, "grown_bytes": grown * 1024}))


if __name__ == "__main__":
    main()
