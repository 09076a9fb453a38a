"""Images in Parquet files, in the layout of Hugging Face data sets, pack like image files."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from drawn_images import all_labels, all_payloads, drawn_image, encoded

from shards.errors import ShardError
from shards.packing import items, parquet
from shards.packing.inputs import list_inputs
from shards.packing.pack import PackOptions, pack
from shards.packing.parquet import Columns
from shards.packing.verify import verify
from shards.reading.shard_set import ShardSet

_SMALL = PackOptions(shard_bytes=20_000)
_STRUCT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
_CLASSES = {"label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}}


def _image(number: int) -> bytes:
    return encoded(drawn_image(number))


def _write(path: Path, numbers: range, labels: list[object] | None = None, plain: bool = False) -> Path:
    """Write a Parquet file of drawn images in row groups of four."""
    cells = [_image(n) if plain else {"bytes": _image(n), "path": f"{n}.jpg"} for n in numbers]
    images = pyarrow.array(cells, pyarrow.binary() if plain else _STRUCT)
    columns = {"id": pyarrow.array(list(numbers)), "image": images}
    if labels is not None:
        columns["label"] = pyarrow.array(labels)
    table = pyarrow.table(columns)
    if not plain:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": _CLASSES}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, row_group_size=4)
    return path


def _content(folder: Path) -> list[tuple[bytes, int]]:
    shard_set = ShardSet.open(folder)
    return list(zip(all_payloads(shard_set), all_labels(shard_set), strict=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_parquet_folder_gives_images_labels_and_class_names(tmp_path: Path, workers: int) -> None:
    _write(tmp_path / "data" / "train-0.parquet", range(10), [number % 3 for number in range(10)])
    _write(tmp_path / "data" / "train-1.parquet", range(10, 17), [None] + [2] * 6)
    (tmp_path / "data" / "README.md").write_text("about")
    report = pack(tmp_path / "data", tmp_path / "set", _SMALL, workers=workers)
    shard_set = ShardSet.open(tmp_path / "set")
    assert shard_set.manifest.classes == ("cat", "dog", "eel") and report.num_ignored == 1
    assert _content(tmp_path / "set") == [
        (_image(number), number % 3 if number < 10 else (-1 if number == 10 else 2)) for number in range(17)
    ]
    assert shard_set.key(0, 3) == "000000003_train-0_parquet_3"
    assert verify(tmp_path / "set") == []


def test_byte_columns_without_labels_and_with_names_as_labels(tmp_path: Path) -> None:
    plain = _write(tmp_path / "plain.parquet", range(5), plain=True)
    pack(plain, tmp_path / "a", _SMALL)
    assert _content(tmp_path / "a") == [(_image(number), -1) for number in range(5)]
    named = _write(tmp_path / "named.parquet", range(3), ["owl", None, "bee"], plain=True)
    pack(named, tmp_path / "b", _SMALL)
    assert ShardSet.open(tmp_path / "b").manifest.classes == ("bee", "owl")
    assert [label for _, label in _content(tmp_path / "b")] == [1, -1, 0]
    pack(named, tmp_path / "c", _SMALL, columns=Columns(label="id"))
    assert [label for _, label in _content(tmp_path / "c")] == [0, 1, 2]


def test_float_labels_and_errors_of_labels(tmp_path: Path) -> None:
    floats = _write(tmp_path / "floats.parquet", range(4), [2.0, float("nan"), None, -1.0])
    pack(floats, tmp_path / "set", _SMALL)
    assert [label for _, label in _content(tmp_path / "set")] == [2, -1, -1, -1]
    for number, (labels, message) in enumerate(
        (
            ([0.5, 1.0], r"bad\.parquet: column 'label': the label 0\.5 is not a whole number"),
            ([1, 99999999999], "the label 99999999999 is not a whole number from 0 to 2147483647"),
            ([1, -7], "the label -7 is not"),
            ([1.0, float("inf")], "the label inf is not"),
            (
                [[1], [2, 3]],
                "contains list, not numbers or names; name another column with --label-column, or '' for no",
            ),
        )
    ):
        bad = _write(tmp_path / f"{number}" / "bad.parquet", range(2), labels)
        with pytest.raises(ShardError, match=message):
            list_inputs(str(bad))
    assert [item.label for item in list_inputs(str(bad), Columns(label="")).items] == [-1, -1]
    _write(tmp_path / "both" / "numbered.parquet", range(2), [0, 1])
    _write(tmp_path / "both" / "named.parquet", range(2), ["owl", "bee"])
    with pytest.raises(ShardError, match="numbers as labels, others names"):
        list_inputs(str(tmp_path / "both"))


def test_shuffle_reads_each_row_group_once(tmp_path: Path) -> None:
    source = _write(tmp_path / "all.parquet", range(40), plain=True)
    order = list_inputs(str(source)).order(3).tolist()
    assert sorted(order) == list(range(40)) and order != list(range(40))
    groups = [number // 4 for number in order]
    assert sum(one != other for one, other in itertools.pairwise(groups)) == 9
    pack(source, tmp_path / "set", PackOptions(shuffle=3))
    assert [payload for payload, _ in _content(tmp_path / "set")] == [_image(number) for number in order]


def test_empty_and_undecodable_cells_are_rejected(tmp_path: Path) -> None:
    cells = [
        {"bytes": _image(0), "path": None},
        {"bytes": None, "path": "elsewhere/1.jpg"},
        {"bytes": b"text", "path": None},
        None,
    ]
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array(cells, _STRUCT)}), tmp_path / "x.parquet")
    report = pack(tmp_path / "x.parquet", tmp_path / "set", _SMALL)
    assert report.manifest.num_samples == 1
    reasons = [json.loads(line) for line in (tmp_path / "set" / "rejected.jsonl").read_text().splitlines()]
    assert [entry["path"] for entry in reasons] == ["x.parquet/1", "x.parquet/2", "x.parquet/3"]
    assert [entry["reason"][:24] for entry in reasons] == [
        "the cell has no bytes, o", "not an image: an unknown", "the cell is empty",
    ]  # fmt: skip


def test_errors_of_columns_and_files(tmp_path: Path) -> None:
    two = pyarrow.table({"a": [b"1"], "b": [b"2"], "n": [1]})
    pyarrow.parquet.write_table(two, tmp_path / "two.parquet")
    pyarrow.parquet.write_table(two.select(["n"]), tmp_path / "none.parquet")
    (tmp_path / "junk.parquet").write_bytes(b"no parquet" * 100)
    for name, columns, message in (
        ("two", Columns(), r"two\.parquet has several columns of bytes \(a, b\); give .* --image-column"),
        ("none", Columns(), "has no column of bytes"),
        ("two", Columns(image="c"), "has no column 'c'; it has a, b, n"),
        ("two", Columns(image="n"), "column 'n' contains int64, not bytes"),
        ("two", Columns(image="a", label="c"), "has no column 'c'"),
        ("junk", Columns(), r"junk\.parquet cannot be read"),
    ):
        with pytest.raises(ShardError, match=message):
            pack(tmp_path / f"{name}.parquet", tmp_path / "set", _SMALL, columns=columns)
        assert not (tmp_path / "set").exists()


def test_missing_pyarrow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    source = _write(tmp_path / "a.parquet", range(2))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ShardError, match="Parquet files need pyarrow: pip install pyarrow"):
        pack(source, tmp_path / "set", _SMALL)


def test_parquet_files_in_a_store(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    for name, numbers in (("0", range(6)), ("1", range(6, 9))):
        local = _write(tmp_path / f"{name}.parquet", numbers)
        files.makedirs("/parquets/data", exist_ok=True)
        files.put_file(str(local), f"/parquets/data/{name}.parquet")
    pack("memory://parquets", tmp_path / "set", _SMALL)
    assert [payload for payload, _ in _content(tmp_path / "set")] == [_image(number) for number in range(9)]
    pack("memory://parquets/data/1.parquet", tmp_path / "one", _SMALL)
    assert len(_content(tmp_path / "one")) == 3


@pytest.mark.parametrize("with_header", [True, False])
def test_server_without_byte_ranges_fails_without_retries(tmp_path: Path, with_header: bool) -> None:
    _write(tmp_path / "large.parquet", range(100), plain=True)
    assert (tmp_path / "large.parquet").stat().st_size > 100_000  # pyarrow fetches smaller files in one request

    class WithoutRanges(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def end_headers(self) -> None:
            if with_header:
                self.send_header("Accept-Ranges", "none")
            super().end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(WithoutRanges, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    began = time.monotonic()
    try:
        with pytest.raises(ShardError, match=r"/large\.parquet cannot be read by byte ranges \(.*\); give a local"):
            list_inputs(f"http://127.0.0.1:{server.server_port}/large.parquet")
    finally:
        server.shutdown()
        server.server_close()
    assert time.monotonic() - began < 10.0


def test_more_rows_than_can_be_images_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = pyarrow.schema([("image", pyarrow.binary())])
    with pyarrow.parquet.ParquetWriter(tmp_path / "x.parquet", schema, compression="zstd") as writer:
        for _ in range(2):
            writer.write_table(pyarrow.table({"image": pyarrow.nulls(1_000_000, pyarrow.binary())}))
    with pytest.raises(ShardError, match=r"x\.parquet states 2000000 rows in \d+ bytes, too few to hold"):
        list_inputs(str(tmp_path / "x.parquet"))
    monkeypatch.setattr(parquet, "MAX_ITEMS", 5)
    for number in range(2):
        _write(tmp_path / "many" / f"{number}.parquet", range(3))
    with pytest.raises(ShardError, match=r"1\.parquet brings the number of rows above 5; make several sets"):
        list_inputs(str(tmp_path / "many"))


def test_one_image_repeated_by_many_rows_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = encoded(drawn_image(1, 400, 300), "PNG")
    pyarrow.parquet.write_table(pyarrow.table({"image": [picture] * 500}), tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 2 * len(picture)
    monkeypatch.setattr(parquet, "_MAX_GROUP_BYTES", 100 * len(picture))
    with pytest.raises(
        ShardError, match=r"row group 0 have more than \d+ bytes; write it again with smaller row groups"
    ):
        pack(tmp_path / "x.parquet", tmp_path / "set", _SMALL)
    names = pyarrow.table({"image": [picture] * 9, "label": ["a" * 5000] * 9})
    pyarrow.parquet.write_table(names, tmp_path / "names.parquet")
    with pytest.raises(ShardError, match="contains names of 5000 characters; name another column"):
        list_inputs(str(tmp_path / "names.parquet"))


@pytest.mark.parametrize("fault", ["ESTALE", "EIO"])
def test_failing_file_system_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    source = _write(tmp_path / "x.parquet", range(12))
    number = getattr(errno, fault)
    monkeypatch.setattr(items, "_PAUSES", (0.0,))
    with monkeypatch.context() as patch:

        def fail(*_: object, **__: object) -> None:
            raise OSError(number, "unreachable")

        listed = list_inputs(str(source))
        patch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", fail)
        parquet._read_column.cache_clear()
        with pytest.raises(items.SourceUnreachable, match=r"x\.parquet cannot be read .* re-run to resume"):
            listed.items[0].location.read()
    assert listed.items[0].location.read() == _image(0)
