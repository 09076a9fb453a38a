"""Shard sets of any channels and depth: packing, verifying, indexing, statistics; 8-bit RGB sets stay as they were."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import exit_status
from drawn_images import all_payloads, draw_folder, file_contents
from faulty_server import faulty_server

pytest.importorskip("tifffile")
from channel_images import ramp, write_ramps

from shards.errors import ShardError
from shards.format.decode import decode
from shards.format.pixels import PixelFormat
from shards.format.set_manifest import SetManifest, ShardEntry
from shards.packing.index_tars import index_tars
from shards.packing.pack import PackOptions, pack
from shards.packing.statistics import store_statistics
from shards.packing.summary import contact_sheet, describe_images
from shards.packing.upload import Upload
from shards.packing.verify import verify
from shards.reading.mixture import open_sets
from shards.reading.shard_set import ShardSet


@pytest.mark.parametrize("channels", [1, 4, 13])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_values_and_statistics_are_exact(tmp_path: Path, channels: int, dtype: str) -> None:
    pixels = PixelFormat(channels, dtype)
    count, values = write_ramps(tmp_path / "src", pixels), ramp(pixels)
    report = pack(tmp_path / "src", tmp_path / "set", PackOptions(pixels=pixels))
    shard_set = ShardSet.open(tmp_path / "set")
    assert (report.manifest.num_samples, report.num_rejected, shard_set.pixels) == (count, 0, pixels)
    assert all(np.array_equal(decode(each, pixels=pixels), values) for each in all_payloads(shard_set))
    assert verify(tmp_path / "set") == []
    found, flat = shard_set.manifest.statistics, values.reshape(-1, channels).astype(np.float64)
    assert found is not None and found.images == count
    assert np.allclose(found.mean, flat.mean(0)) and np.allclose(found.std, flat.std(0))
    exact = np.percentile(flat, 99, axis=0, method="inverted_cdf")
    assert np.allclose(found.percentiles["99"], exact, rtol=0.01 if dtype == "float32" else 0)


def test_a_set_depends_neither_on_workers_nor_on_interruptions(tmp_path: Path) -> None:
    pixels = PixelFormat(4, "uint16")
    options = PackOptions(pixels=pixels, shard_bytes=60_000)
    write_ramps(tmp_path / "src", pixels)
    np.save(tmp_path / "src" / "other.npy", ramp(PixelFormat(3, "uint16")))
    for workers in (1, 2):
        report = pack(tmp_path / "src", tmp_path / f"set{workers}", options, workers=workers)
    assert report.num_rejected == 1
    assert file_contents(tmp_path / "set1") == file_contents(tmp_path / "set2")
    assert index_and_verify(tmp_path / "set1", pixels, tmp_path / "indexed") == []
    assert any("4 channels of uint16" in line for line in describe_images(ShardSet.open(tmp_path / "set1")))
    assert contact_sheet(ShardSet.open(tmp_path / "set1"), ()).startswith(b"\x89PNG")


def index_and_verify(set_dir: Path, pixels: PixelFormat, out: Path) -> list:
    index_tars([str(set_dir / "shards")], out, pixels=pixels)
    assert ShardSet.open(out).num_samples == ShardSet.open(set_dir).num_samples
    return verify(out)


def test_rgb_sets_have_no_new_fields_and_pass_arrays_over(tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", 4)
    np.save(tmp_path / "images" / "mask.npy", ramp(PixelFormat(1, "uint8")))
    report = pack(tmp_path / "images", tmp_path / "set", PackOptions(shard_bytes=10_000))
    assert (report.num_ignored, report.num_rejected) == (1, 0)
    content = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert not {"channels", "dtype", "statistics"} & content.keys()
    tars = [(each.name, each.sha256) for each in report.manifest.shards]
    assert not store_statistics(str(tmp_path / "set")).fault
    after = SetManifest.load(tmp_path / "set")
    assert [(each.name, each.sha256) for each in after.shards] == tars and after.digest == report.manifest.digest
    assert after.pixels.is_rgb and verify(tmp_path / "set") == []


def test_options_and_mixtures_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    pixels = PixelFormat(4, "uint8")
    write_ramps(tmp_path / "src", pixels)
    with pytest.raises(ShardError, match="--max-side and --orientation apply write 8-bit RGB JPEGs, not 4 channels"):
        pack(tmp_path / "src", tmp_path / "set", PackOptions(pixels=pixels, max_side=64))
    with pytest.raises(ShardError, match="--quality applies to re-encoded JPEGs"):
        pack(tmp_path / "src", tmp_path / "set", PackOptions(pixels=pixels, quality=50))
    with pytest.raises(ShardError, match=r"first: array.npy: an array of shape .* is not an image of 2 channels; "):
        pack(tmp_path / "src", tmp_path / "set", PackOptions(pixels=replace(pixels, channels=2)))
    for name in ("array", "first", "swapped"):
        (tmp_path / "arrays").mkdir(exist_ok=True)
        shutil.move(tmp_path / "src" / f"{name}.npy", tmp_path / "arrays")
    with pytest.raises(ShardError, match=r"\.npy files are images only with --channels and --dtype"):
        pack(tmp_path / "arrays", tmp_path / "set")
    pack(tmp_path / "arrays", tmp_path / "set", PackOptions(pixels=pixels))
    pack(draw_folder(tmp_path / "images", 2), tmp_path / "rgb")
    with pytest.raises(ShardError, match=r"set has 4 channels of uint8, .*rgb has 3 channels of uint8; mix equal"):
        open_sets([(str(tmp_path / "rgb"), 1.0), (str(tmp_path / "set"), 1.0)])


def test_damaged_statistics_are_an_error_in_one_line(tmp_path: Path) -> None:
    pixels = PixelFormat(1, "uint8")
    write_ramps(tmp_path / "src", pixels)
    pack(tmp_path / "src", tmp_path / "set", PackOptions(pixels=pixels))
    path = tmp_path / "set" / "manifest.json"
    content = json.loads(path.read_text())
    huge = {**content["statistics"], "mean": [10**400]}
    wrong = [{"statistics": each} for each in ({"images": 1}, {**huge, "std": ["nan"]}, huge, [], "x", None)]
    for changed in (*wrong, {"channels": 2}, {"channels": "1"}, {"channels": 10**9}, {"dtype": "int8"}, {"dtype": []}):
        path.write_text(json.dumps(content | changed))
        with pytest.raises(ShardError):
            ShardSet.open(tmp_path / "set")


def test_the_commands_pack_and_measure_a_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = PixelFormat(4, "uint16")
    count = write_ramps(tmp_path / "src", pixels)
    words = ["pack", "--src", tmp_path / "src", "--out", tmp_path / "set", "--workers", "1"]
    assert exit_status([*words, "--channels", "4", "--dtype", "uint16"]) == 0
    stored = ShardSet.open(tmp_path / "set").manifest.statistics
    assert stored is not None
    assert exit_status(["stats", tmp_path / "set", "--workers", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"stored the statistics of {count} images in the manifest"
    assert [float(line.split()[1]) for line in printed[-5:-1]] == pytest.approx(list(stored.mean), rel=1e-5)
    assert exit_status(["stats", tmp_path / "absent"]) == 2


def test_a_set_at_a_url_has_the_statistics_of_a_local_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels, url = PixelFormat(4, "float32"), f"file://{tmp_path}/remote"
    options = PackOptions(pixels=pixels, shard_bytes=60_000)
    write_ramps(tmp_path / "src", pixels)
    expected = pack(tmp_path / "src", tmp_path / "local", options).manifest
    assert len(expected.shards) > 2
    with monkeypatch.context() as patch:
        send, left = Upload.send_shard, iter((True, True, False))

        def interrupt(upload: Upload, entry: ShardEntry) -> None:
            if not next(left):
                raise KeyboardInterrupt
            send(upload, entry)

        patch.setattr(Upload, "send_shard", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pack(tmp_path / "src", url, options, scratch=tmp_path / "scratch")
    assert pack(tmp_path / "src", url, options, scratch=tmp_path / "scratch").manifest == expected
    assert verify(url) == []
    path = tmp_path / "remote" / "manifest.json"
    packed = path.read_bytes()
    replace(expected, statistics=None).save(path.parent)
    with faulty_server(tmp_path / "remote") as server:
        assert exit_status(["stats", server.url, "--workers", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert f"not stored: {server.url} is read-only" in printed[-2] and "crops.value_range=[0,1]" in printed[-2]
    assert printed[-1].startswith(f"crops.mean=[{expected.statistics.mean[0]:.6g},")
    assert SetManifest.load(url).statistics is None
    assert exit_status(["stats", url, "--workers", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("stored") and path.read_bytes() == packed
    (tmp_path / "remote" / "shards" / "000001.tar").unlink()
    assert exit_status(["stats", url, "--workers", "1"]) == 2
    assert "remote/shards/000001.tar does not exist" in capsys.readouterr().err
