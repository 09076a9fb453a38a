"""Cutting images into tiles: which tiles, their pixels, background, refusals, resuming, and memory."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from drawn_images import all_labels, all_payloads, drawn_image, encoded, file_contents
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("tifffile")
import tifffile
from channel_images import ramp, tiff, write_ramps

from shards.errors import ShardError
from shards.format.decode import decode
from shards.format.pixels import RGB, PixelFormat
from shards.format.set_manifest import JOURNAL_NAME, ShardEntry
from shards.packing.pack import PackOptions, PackReport, pack
from shards.packing.shard_writer import ShardWriter
from shards.packing.tiles import SKIPPED_TILES, Tiling
from shards.packing.upload import REJECTED_NAME
from shards.packing.verify import verify
from shards.reading.shard_set import ShardSet


def pack_tiles(folder: Path, tiling: Tiling, pixels: PixelFormat = RGB, **options: object) -> tuple[PackReport, dict]:
    """Pack ``folder/src``; return the report, and each tile's pixels by the end of its key."""
    out = folder / "set"
    report = pack(folder / "src", out, PackOptions(pixels=pixels, tiles=tiling, **options))
    assert verify(out) == []
    return report, tiles_of(ShardSet.open(out))


def pack_twice(src: Path, out: Path, options: PackOptions) -> PackReport:
    """Pack, interrupted after two shards, and resume."""
    finish = ShardWriter.finish
    first = iter(range(2))

    def finish_two(writer: ShardWriter) -> ShardEntry:
        if next(first, None) is None:
            raise KeyboardInterrupt
        return finish(writer)

    with mock.patch.object(ShardWriter, "finish", finish_two), pytest.raises(KeyboardInterrupt):
        pack(src, out, options)
    assert (out / JOURNAL_NAME).read_text().count("\n") == 3
    return pack(src, out, options)


def tiles_of(shard_set: ShardSet) -> dict[str, np.ndarray]:
    places = [(shard, number) for shard, size in enumerate(shard_set.sizes.tolist()) for number in range(size)]
    return {
        shard_set.key(*place).partition("_")[2]: decode(shard_set.read(*place), pixels=shard_set.pixels)
        for place in places
    }


@given(st.integers(1, 300), st.integers(16, 90), st.integers(0, 15))
def test_tiles_cover_every_pixel_and_are_full(length: int, side: int, overlap: int) -> None:
    tiling = Tiling(side, overlap)
    spans = [tiling.span(number, length) for number in range(tiling.count(length))]
    assert spans[0][0] == 0 and spans[-1][1] == length and len(set(spans)) == len(spans)
    assert all(end - begin == min(side, length) for begin, end in spans)
    assert all(after[0] <= before[1] - overlap for before, after in pairwise(spans))


@pytest.mark.parametrize("kind", ["1 uint8", "4 uint8", "1 uint16", "2 uint16", "3 uint16", "4 uint16", "13 float32"])
def test_tiles_are_exact(tmp_path: Path, kind: str) -> None:
    pixels = PixelFormat(int(kind.split()[0]), kind.split()[1])
    count, values = write_ramps(tmp_path / "src", pixels), ramp(pixels)
    report, tiles = pack_tiles(tmp_path, Tiling(16, 4, contrast=0), pixels)
    # rows at 0, 12, 24 and columns at 0, 12, 16
    assert (report.num_rejected, len(tiles)) == (0, count * 9)
    for name in ("array", "plain", "planes", "lzw"):
        assert np.array_equal(tiles[f"{name}_r002_c001"], values[24:40, 12:28])
        assert np.array_equal(tiles[f"{name}_r000_c002"], values[:16, 16:])
    assert report.manifest.statistics is not None and report.manifest.statistics.images == count * 9


def test_rgb_files_of_every_kind_keep_labels(tmp_path: Path) -> None:
    for number, kind in enumerate(("PNG", "JPEG", "TIFF")):
        folder = tmp_path / "src" / f"class{number}"
        folder.mkdir(parents=True)
        (folder / f"image.{kind.lower()}").write_bytes(encoded(drawn_image(number, 40, 30), kind))
    tiny = drawn_image(7, 20, 10)
    (tmp_path / "src" / "class0" / "tiny.png").write_bytes(encoded(tiny, "PNG"))
    report, tiles = pack_tiles(tmp_path, Tiling(24, contrast=0))
    assert report.manifest.classes == ("class0", "class1", "class2")
    assert sorted(all_labels(ShardSet.open(tmp_path / "set"))) == [0] * 5 + [1] * 4 + [2] * 4
    assert all(payload.startswith(b"\x89PNG") for payload in all_payloads(ShardSet.open(tmp_path / "set")))
    for number in range(3):
        whole = decode(next((tmp_path / "src" / f"class{number}").glob("image.*")).read_bytes())
        assert np.array_equal(tiles[f"class{number}_image_r001_c001"], whole[6:, 16:])
    assert np.array_equal(tiles["class0_tiny_r000_c000"], np.asarray(tiny))


def test_background_is_skipped_counted_and_told(tmp_path: Path) -> None:
    values = np.full((64, 96, 3), 240, np.uint8)
    values[:32, :32, 1] += np.arange(32, dtype=np.uint8) % 5  # a contrast of 4 of 255
    values[32:, 64:, 2] = np.arange(32) * 8
    (tmp_path / "src").mkdir()
    tifffile.imwrite(tmp_path / "src" / "slide.tif", values, photometric="rgb", tile=(16, 16))
    for contrast, kept in ((None, ["slide_r001_c002"]), (0.01, ["slide_r000_c000", "slide_r001_c002"])):
        folder = tmp_path / str(contrast)
        folder.mkdir()
        (folder / "src").symlink_to(tmp_path / "src")
        report, tiles = pack_tiles(folder, Tiling(32, contrast=contrast))
        assert sorted(tiles) == kept and report.passed_over.reasons[SKIPPED_TILES] == 6 - len(kept)
        assert report.num_rejected == 0 and not report.num_ignored
    with pytest.raises(ShardError, match=r"all 6 tiles of .* are background; lower --tile-contrast"):
        pack(tmp_path / "src", tmp_path / "none", PackOptions(tiles=Tiling(32, contrast=1)))
    nearly_constant = np.full((32, 32, 1), 500, np.uint16)
    assert Tiling(32).is_background(nearly_constant)
    assert not Tiling(32).is_background(nearly_constant + np.arange(32, dtype=np.uint16)[:, None])


def test_a_set_depends_neither_on_workers_nor_on_interruptions(tmp_path: Path) -> None:
    pixels = PixelFormat(4, "uint16")
    write_ramps(tmp_path / "src", pixels)
    (tmp_path / "src" / "broken.tif").write_bytes((tmp_path / "src" / "plain.tif").read_bytes()[:-50])
    for seed in (None, 3):
        options = PackOptions(pixels=pixels, shard_bytes=10_000, shuffle=seed, tiles=Tiling(16, contrast=0.5))
        outs = [tmp_path / f"{seed}-{number}" for number in range(3)]
        # starting processes takes seconds
        for out, workers in zip(outs[:2], (1, 1 if seed else 2), strict=True):
            report = pack(tmp_path / "src", out, options, workers=workers)
        whole = ShardSet.open(outs[0])
        assert whole.num_shards > 3 and report.passed_over.reasons[SKIPPED_TILES] == 0
        rejected = [json.loads(line) for line in (outs[0] / REJECTED_NAME).read_text().splitlines()]
        assert rejected == [{"path": "broken.tif", "reason": "it is truncated, or tiles are missing"}]
        pack_twice(tmp_path / "src", outs[2], options)
        assert file_contents(outs[0]) == file_contents(outs[1]) == file_contents(outs[2])
        keys = list(tiles_of(whole))
        images = [key.partition("_r0")[0] for key in keys]
        assert len(set(images)) == sum(a != b for a, b in pairwise(images)) + 1
        assert (keys == sorted(keys)) == (seed is None)


def test_skipped_tiles_are_counted_over_an_interruption(tmp_path: Path) -> None:
    values = np.zeros((32, 640, 1), np.uint16)
    values[:, ::32] = np.arange(32)[:, None, None] * 2000
    values[:, 1::32] = values[:, ::32]
    values[:, :64] = values[:, 320:384] = 0
    (tmp_path / "src").mkdir()
    tiff(values, tmp_path / "src" / "scan.tif", tile=(16, 16))
    options = PackOptions(pixels=PixelFormat(1, "uint16"), shard_bytes=4000, tiles=Tiling(32))
    report = pack_twice(tmp_path / "src", tmp_path / "set", options)
    assert (report.passed_over.reasons[SKIPPED_TILES], report.manifest.num_samples) == (4, 16)


def test_a_damaged_part_costs_its_tiles_only(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    path = tmp_path / "src" / "scan.tif"
    pixels = PixelFormat(1, "uint16")
    tiff(ramp(pixels, height=64, width=64), path, tile=(16, 16), compression="zlib")
    with tifffile.TiffFile(path) as file:
        offset = file.pages.first.dataoffsets[5]
    with open(path, "r+b") as damaged:
        damaged.seek(offset)
        damaged.write(b"\xff" * 20)
    report, tiles = pack_tiles(tmp_path, Tiling(32, contrast=0), pixels)
    assert sorted(tiles) == ["scan_r000_c001", "scan_r001_c000", "scan_r001_c001"]
    (line,) = (tmp_path / "set" / REJECTED_NAME).read_text().splitlines()
    assert json.loads(line)["path"] == "scan.tif" and json.loads(line)["reason"].startswith("tile r000_c000: ")
    assert report.num_rejected == 1


def test_claims_of_headers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "good.png").write_bytes(encoded(drawn_image(1, 40, 30), "PNG"))
    (tmp_path / "src" / "text.tif").write_text("not an image")
    claim = bytearray(encoded(drawn_image(2, 40, 30), "PNG"))
    claim[16:24] = (60_000).to_bytes(4, "big") * 2
    (tmp_path / "src" / "claim.png").write_bytes(claim)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.zeros((64, 64, 3), np.uint8), photometric="rgb", tile=(16, 16))
    payload = bytearray(buffer.getvalue())
    with tifffile.TiffFile(io.BytesIO(payload)) as file:
        for name in ("ImageWidth", "ImageLength"):
            tag = file.pages.first.tags[name]
            payload[tag.valueoffset : tag.valueoffset + 2] = (60_000).to_bytes(2, "little")
    (tmp_path / "src" / "wide.tif").write_bytes(payload)
    report, tiles = pack_tiles(tmp_path, Tiling(16, contrast=0))
    assert {key[:4] for key in tiles} == {"good"} and report.num_rejected == 3
    reasons = (tmp_path / "set" / REJECTED_NAME).read_text()
    for part in (
        "60000x60000 is more than",
        "not an image: an unknown format",
        "it is truncated, or tiles are missing",
    ):
        assert part in reasons
    for name in ("text.tif", "claim.png", "wide.tif"):
        (tmp_path / "src" / name).unlink()
    with mock.patch("shards.packing.tiles.MAX_TILES", 5), pytest.raises(ShardError, match="2x3 tiles are more than 5"):
        pack(tmp_path / "src", tmp_path / "few", PackOptions(tiles=Tiling(16)))


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "good.png").write_bytes(encoded(drawn_image(1, 40, 30), "PNG"))
    for wrong in ({"side": 15}, {"side": 16, "overlap": 16}, {"side": 16, "contrast": 2.0}, {"side": 70_000}):
        with pytest.raises(ShardError):
            Tiling(**wrong)
    for options in ({"max_side": 64}, {"upright": True}, {"pixels": PixelFormat(13, "float32")}):
        with pytest.raises(ShardError, match="--tiles"):
            pack(tmp_path / "src", tmp_path / "set", PackOptions(tiles=Tiling(8192), **options))


_PACK_AND_PRINT_PEAK = """
import resource, sys
from shards.format.set_manifest import JOURNAL_NAME, ShardEntry
from shards.packing.pack import PackOptions, pack
from shards.packing.shard_writer import ShardWriter
from shards.packing.tiles import Tiling
report = pack(sys.argv[1], sys.argv[2], PackOptions(tiles=Tiling(512)))
print(report.manifest.num_samples, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("part_size", [(256, 256), (16, 20_000)])
def test_memory_does_not_grow_with_the_image(tmp_path: Path, part_size: tuple[int, int]) -> None:
    """An image of 20 000 x 20 000 pixels, written and read in tiles, and in tiles as wide as strips."""
    side = 20_000
    part = np.indices(part_size).sum(0)[..., None] + np.arange(3)
    count = -(-side // part_size[0]) * -(-side // part_size[1])
    (tmp_path / "src").mkdir()
    tifffile.imwrite(
        tmp_path / "src" / "slide.tif", ((part + number).astype(np.uint8) for number in range(count)), tile=part_size,
        shape=(side, side, 3), dtype=np.uint8, photometric="rgb", compression="zlib", compressionargs={"level": 1},
    )  # fmt: skip
    command = [sys.executable, "-c", _PACK_AND_PRINT_PEAK, tmp_path / "src", tmp_path / "set"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    samples, peak = map(int, done.stdout.split())
    print(f"peak memory with parts of {part_size}: {peak / 1024:.0f} MiB")
    assert samples == 40 * 40 and peak * 1024 < 500e6
