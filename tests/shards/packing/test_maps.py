"""Masks and depth maps that are packed with the images: each with its own image, never read in training."""

from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from drawn_images import add_to_tar, all_payloads, drawn_image, encoded, file_contents
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mapped_folders import mapped_folder
from PIL import Image

from shards.errors import ShardError
from shards.format.set_manifest import SetManifest
from shards.format.tar_members import MAP_EXTENSIONS
from shards.packing.index_tars import index_tars
from shards.packing.pack import PackOptions, pack
from shards.packing.summary import describe_rejected
from shards.packing.verify import verify
from shards.reading.order import Order
from shards.reading.set_maps import SetMaps
from shards.reading.shard_set import ShardSet
from shards.reading.source import Source

_IMAGE = encoded(drawn_image(0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return mapped_folder(tmp_path, 9)


def _options(folder: Path, **others: object) -> PackOptions:
    options = PackOptions(shard_bytes=40_000, seg=folder / "masks", depth=folder / "depth")
    return replace(options, **others)  # type: ignore[arg-type]


def _maps(location: Path | str, kind: str) -> dict[str, bytes]:
    """Return the maps of a set by the key of their image."""
    shard_set = ShardSet.open(location)
    maps = SetMaps(shard_set, kind)
    return {
        shard_set.key(shard, sample): maps.read(shard, sample)
        for shard, size in enumerate(shard_set.sizes.tolist())
        for sample in np.flatnonzero(maps.exist(shard, np.arange(size))).tolist()
    }


def test_each_image_gets_the_map_of_its_name_byte_for_byte(folder: Path) -> None:
    masks = folder / "masks" / "a"
    (masks / "3.png").rename(masks / "extra.PNG")
    (masks / "5.png").rename(masks / "5.PNG")
    Image.new("I;16", (10, 10), 500).save(folder / "depth" / "a" / "4.png")  # .npy is preferred
    report = pack(folder / "images", folder / "set", _options(folder))
    packed = _maps(folder / "set", "seg")
    files = {int(path.stem): path for path in masks.iterdir() if path.stem != "extra"}
    assert packed == {f"{number:09d}_a_{number}": path.read_bytes() for number, path in files.items()}
    assert _maps(folder / "set", "depth")["000000004_a_4"] == (folder / "depth" / "a" / "4.npy").read_bytes()
    assert sum(report.manifest.maps["seg"]) == 8 and sum(report.manifest.maps["depth"]) == 9
    assert len(report.manifest.shards) > 2 and report.num_rejected == 0
    assert report.passed_over.reasons[f"images without a mask in {folder / 'masks'}"] == 1
    assert report.passed_over.reasons[f"masks without an image in {folder / 'images'}, passed over"] == 1
    assert verify(folder / "set") == []
    # other readers find them as members of the sample
    with tarfile.open(folder / "set" / "shards" / "000000.tar") as tar:
        assert tar.getnames()[:3] == [f"000000000_a_0.{end}" for end in ("png", "seg.png", "depth.npy")]
    assert "000000000_a_0.seg.png" in (folder / "set" / "index" / "000000.idx").read_text().splitlines()[1]


def test_workers_and_interruptions_do_not_change_the_set(folder: Path) -> None:
    whole = pack(folder / "images", folder / "whole", _options(folder), workers=2)
    pack(folder / "images", folder / "set", _options(folder))
    assert file_contents(folder / "whole") == file_contents(folder / "set")
    # killed after the first shard
    out = folder / "set"
    manifest = json.loads((out / "manifest.json").read_text())
    first = {"shard": manifest["shards"][0], "next_position": manifest["shards"][0]["samples"], "rejected": []}
    first |= {"seen": [], "maps": {kind: counts[0] for kind, counts in manifest["maps"].items()}}
    lines = [{"fingerprint": manifest["fingerprint"]}, first]
    (out / "packing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in (out / "manifest.json", *out.glob("*/00000[1-9]*")):
        path.unlink()
    resumed = pack(folder / "images", out, _options(folder))
    assert resumed.manifest == whole.manifest and file_contents(out) == file_contents(folder / "whole")
    with pytest.raises(ShardError, match="already contains another shard set"):
        pack(folder / "images", out, _options(folder, depth=None))


def test_a_set_in_a_store_has_the_same_maps(folder: Path) -> None:
    fsspec.filesystem("memory").store.clear()
    options = _options(folder)
    local = pack(folder / "images", folder / "set", options)
    assert pack(folder / "images", "memory://maps/set", options, scratch=folder / "scratch").manifest == local.manifest
    assert not (folder / "scratch").exists()
    for kind in MAP_EXTENSIONS:
        assert list(_maps("memory://maps/set", kind).values()) == list(_maps(folder / "set", kind).values())
    assert verify("memory://maps/set") == []


def test_unusable_maps_are_listed_and_their_images_kept(folder: Path) -> None:
    masks = folder / "masks" / "a"
    Image.new("L", (40, 80)).save(masks / "5.png")
    Image.new("RGB", Image.open(masks / "6.png").size).save(masks / "6.png")
    (masks / "7.png").write_bytes((masks / "7.png").read_bytes()[:60])
    report = pack(folder / "images", folder / "set", _options(folder))
    assert report.manifest.num_samples == 9 and report.num_rejected == 0
    assert len(_maps(folder / "set", "seg")) == 6 == sum(report.manifest.maps["seg"])
    listed = [json.loads(line) for line in (folder / "set" / "rejected.jsonl").read_text().splitlines()]
    assert [entry["path"] for entry in listed] == ["a/5.png", "a/6.png", "a/7.png"]
    assert "packed without its mask: it has 40x80 pixels, its image" in listed[0]["reason"]
    assert "picture in colour" in listed[1]["reason"]
    assert report.rejected is not None
    assert describe_rejected(report.rejected, "LOG")[0] == "rejected 3 maps, listed in LOG:"


def test_maps_may_have_another_resolution_than_a_shrunk_image(folder: Path) -> None:
    report = pack(folder / "images", folder / "set", _options(folder, max_side=24))
    assert sum(report.manifest.maps["seg"]) == 9
    key, packed = next(iter(_maps(folder / "set", "seg").items()))
    assert packed == (folder / "masks" / "a" / f"{key[-1]}.png").read_bytes()
    assert verify(folder / "set") == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seg": "depth", "depth": None}, r"no image of .* has a file in --seg .*: a/0.png needs .*depth/a/0.png"),
        ({"seg": "nowhere"}, r"--seg .*nowhere is not a folder; give the folder of the masks"),
        ({"depth": "masks"}, r"none of the 4 depth maps tried in --depth can be used; the first: .*16 bits"),
        ({"seg": "images/a"}, r"--seg .* is inside --src"),
    ],
)  # fmt: skip
def test_wrong_folders_are_refused_before_packing(folder: Path, options: dict[str, str | None], words: str) -> None:
    given = {name: value and folder / value for name, value in options.items()}
    with pytest.raises(ShardError, match=words):
        pack(folder / "images", folder / "set", _options(folder, **given))
    assert not (folder / "set").exists()


def test_a_list_with_folders_of_maps_is_refused(folder: Path) -> None:
    (folder / "list.txt").write_text("images/a/0.png\n")
    with pytest.raises(ShardError, match=r"needs a local folder of images as --src"):
        pack(folder / "list.txt", folder / "set", _options(folder))


def _bytes_read(shard_set: ShardSet) -> int:
    """Return how many bytes the process reads for one epoch of a training stream."""
    source = Source(shard_set, Order(shard_set.sizes, seed=1), threads=2)

    def read_epoch(epoch: int) -> int:
        begin = int(Path("/proc/self/io").read_text().split()[1])
        count = shard_set.num_samples
        list(source.batches([np.arange(count) + epoch * count]))
        return int(Path("/proc/self/io").read_text().split()[1]) - begin

    read_epoch(0)  # opens the files and reads the indexes
    return read_epoch(1)


@pytest.mark.skipif(not os.access("/proc/self/io", os.R_OK), reason="needs Linux's counter of the bytes read")
def test_training_never_reads_the_maps(folder: Path) -> None:
    pack(folder / "images", folder / "plain", PackOptions())
    pack(folder / "images", folder / "mapped", _options(folder, shard_bytes=1 << 20))
    plain, mapped = (ShardSet.open(folder / name) for name in ("plain", "mapped"))
    images = all_payloads(plain)
    assert all_payloads(mapped) == images and mapped.manifest.num_bytes > 2 * plain.manifest.num_bytes
    read = [_bytes_read(shard_set) for shard_set in (plain, mapped)]
    # the counter's own file changes by a few digits
    assert abs(read[1] - read[0]) < 50 and read[0] == pytest.approx(sum(map(len, images)), abs=500)


def _member(name: str) -> bytes:
    """Return content that is unique to a name and can be decoded."""
    if not name.endswith(("seg.png", "depth.png", "npy")):
        return _IMAGE
    size = Image.open(io.BytesIO(_IMAGE)).size
    number = sum(name.encode()) % 200
    if name.endswith("npy"):
        buffer = io.BytesIO()
        np.save(buffer, np.full(size[::-1], 1 + number, np.float32))
        return buffer.getvalue()
    return encoded(Image.new("L" if "seg" in name else "I;16", size, number), "PNG")


_NAMES = st.builds(
    lambda folder, stem, extension: f"{folder}{stem}.{extension}",
    st.sampled_from(["", "d/", "./"]),
    st.text("ab.", min_size=1, max_size=3).filter(lambda stem: stem.strip(".") == stem and ".." not in stem),
    st.sampled_from(["jpg", "seg.png", "depth.png", "depth.npy"]),
)


@settings(max_examples=60, deadline=None)
@given(names=st.lists(_NAMES, min_size=1, max_size=9, unique=True))
def test_a_tar_packed_or_indexed_pairs_maps_with_the_image_of_their_name(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    stems = [name.removesuffix(".jpg") for name in names if name.endswith(".jpg")]
    # of a.jpg and a.b.jpg, which have the same key for WebDataset, indexing takes the first only
    assume(not any(other.startswith(f"{stem}.") for stem in stems for other in stems))
    folder = tmp_path_factory.mktemp("tar")
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name in sorted(names):
            add_to_tar(tar, name, _member(name))
    images: dict[str, dict[str, dict[str, bytes]]] = {stem: {} for stem in stems}
    for name in names:
        for kind, extensions in MAP_EXTENSIONS.items():
            for extension in extensions:
                stem = name.removesuffix(f".{extension}")
                if stem != name and stem in images:
                    images[stem].setdefault(kind, {})[extension] = _member(name)
    if not images:
        return
    expected = {
        kind: sorted(
            found[kind][min(found[kind], key=MAP_EXTENSIONS[kind].index)] for found in images.values() if kind in found
        )
        for kind in MAP_EXTENSIONS
    }
    index_tars([str(folder / "x.tar")], folder / "indexed")
    pack(folder / "x.tar", folder / "packed", PackOptions())
    for name in ("indexed", "packed"):
        assert {kind: sorted(_maps(folder / name, kind).values()) for kind in MAP_EXTENSIONS} == expected
        manifest = SetManifest.load(folder / name)
        assert {kind: sum(counts) for kind, counts in manifest.maps.items()} == {
            kind: len(found) for kind, found in expected.items() if found
        }
        assert [str(fault) for fault in verify(folder / name)] == []


def test_verify_finds_a_damaged_map_and_a_missing_index(folder: Path) -> None:
    pack(folder / "images", folder / "set", _options(folder, shard_bytes=1 << 20))
    shard_set = ShardSet.open(folder / "set")
    index = shard_set.map_index(0, "seg")
    assert index is not None
    with open(shard_set.tar_path(0), "r+b") as tar:
        tar.seek(int(index.record(2)["offset"]) + 50)
        tar.write(b"xxx")
    (folder / "set" / "index" / "000000.depth.npy").unlink()
    faults = "\n".join(map(str, verify(folder / "set")))
    assert "sample 2 (key '000000002_a_2'): its mask: its map differs from the packed one" in faults
    assert "index/000000.depth.npy: index" in faults and "is missing" in faults
    # training does not need them
    assert len(all_payloads(ShardSet.open(folder / "set"))) == 9


def test_verify_names_an_empty_map_of_an_indexed_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, payload in (("a.jpg", _IMAGE), ("a.seg.png", b"")):
            add_to_tar(tar, name, payload)
    index_tars([str(tmp_path / "x.tar")], tmp_path / "set")
    (fault,) = verify(tmp_path / "set")
    assert str(fault).endswith("its mask: the file is empty")


def test_a_manifest_with_impossible_counts_is_refused(folder: Path) -> None:
    pack(folder / "images", folder / "set", _options(folder))
    path = folder / "set" / "manifest.json"
    content = json.loads(path.read_text())
    for maps in ({"seg": [1]}, {"seg": [99] * len(content["shards"])}, {"seg": 3}, ["seg"]):
        path.write_text(json.dumps(content | {"maps": maps}))
        with pytest.raises(ShardError, match=r"manifest.json"):
            SetManifest.load(folder / "set")
    path.write_text(json.dumps(content | {"maps": {"normals": [1]}}))
    assert SetManifest.load(folder / "set").maps == {}
