"""Windows of large images in the loader (``crops.window``): positions, the laws of the stream, refusals, memory."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_images import drawn_image

pytest.importorskip("tifffile")
import tifffile
from data.test_channels import small_config
from data.test_loader import assert_same, group_by_slot, make_loader, take, with_data

from shards.format.pixels import RGB, PixelFormat
from shards.packing.index_tars import index_tars
from shards.packing.pack import PackOptions, pack
from shards.reading.random_window import RandomWindow
from streamtrain.config.load import build
from streamtrain.config.tree import Config
from streamtrain.errors import ConfigError

SIDE, WINDOW = 4096, 128
TWO = PixelFormat(2, "uint16")


@pytest.fixture(scope="module")
def coordinates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of one tiled TIFF of two channels, whose values are row and column."""
    folder = tmp_path_factory.mktemp("coordinates")
    values = np.empty((SIDE, SIDE, 2), np.uint16)
    values[..., 0], values[..., 1] = np.ogrid[:SIDE, :SIDE]
    options = {"tile": (256, 256), "planarconfig": "contig"}
    tifffile.imwrite(folder / "ramp.tif", values, photometric="minisblack", metadata=None, **options)
    return indexed(folder / "ramp.tif", TWO)


def indexed(image: Path, pixels: PixelFormat) -> Path:
    """Return a set of one image, kept as it is."""
    with tarfile.open(image.with_suffix(".tar"), "w") as tar:
        tar.add(image, image.name)
    index_tars([str(image.with_suffix(".tar"))], image.with_name("set"), pixels=pixels)
    return image.with_name("set")


def windowed(path: Path, **crops: Any) -> Config:
    """Return settings whose views are neither resized nor changed in their values, apart from one local view."""
    unchanged = {"aspect": [1, 1], "flip": 0, "global_size": 64, "global_scale": [0.25, 0.25], "local_count": 1}
    no_blur = {"blur.global_probability": [0], "blur.local_probability": 0}
    return small_config(path, **unchanged, **no_blur, window=WINDOW, mean=[0.5], std=[0.2], **crops)


def test_views_come_from_the_window_of_their_slot(coordinates: Path) -> None:
    config = windowed(coordinates)
    samples = group_by_slot(take(make_loader(config), 4), config)
    drawn = [RandomWindow(WINDOW, config.run.seed).draw(slot, SIDE, SIDE) for slot in samples]
    assert len(set(drawn)) == 16  # the set has one image, so that each slot is another epoch
    for (views, local_views, _), (top, left, bottom, right) in zip(samples.values(), drawn, strict=True):
        for view in views:
            y, x = (int(value) for value in view[0, 0])
            assert torch.equal(view, torch.from_numpy(np.stack(np.mgrid[y : y + 64, x : x + 64], -1)).float())
            assert top <= y <= bottom - 64 and left <= x <= right - 64
        assert (local_views.amin((0, 1, 2)) >= torch.tensor([top, left]) - 1).all()
        assert (local_views.amax((0, 1, 2)) <= torch.tensor([bottom, right])).all()


def test_ranks_resume_and_micro_batches_do_not_change_windows(coordinates: Path) -> None:
    config = with_data(windowed(coordinates), global_batch=8, micro_batch=8)
    one = group_by_slot(take(make_loader(config), 3), config)
    loaders = [make_loader(with_data(config, micro_batch=2), rank, 2) for rank in range(2)]
    assert_same(one, group_by_slot([batch for loader in loaders for batch in take(loader, 6)], config))
    resumed = group_by_slot(take(make_loader(config, start_slot=8), 2), config)
    assert_same(resumed, {slot: parts for slot, parts in one.items() if slot >= 8})


def test_images_that_are_decoded_whole_have_windows_too(tmp_path: Path) -> None:
    """By DALI, by the host, and from a TIFF, an image has the same views."""
    values = np.asarray(drawn_image(3, 300, 200))
    found = []
    for name in ("dali.png", "host.png", "tiles.tif", "whole.tif"):
        folder = tmp_path / name
        (folder / "src").mkdir(parents=True)
        if name.endswith("png"):
            options = {"icc_profile": b"x"} if name == "host.png" else {}
            drawn_image(3, 300, 200).save(folder / "src" / name, **options)
        else:
            alpha = np.full((200, 300, 1), 255, np.uint8)
            pixels = np.concatenate([values, alpha], -1) if name == "whole.tif" else values
            tifffile.imwrite(folder / "src" / name, pixels, photometric="rgb", tile=(64, 64))
        pack(folder / "src", folder / "set", PackOptions())
        overrides = {"run": {"seed": 5}, "data": {"shards": str(folder / "set"), "micro_batch": 4}}
        config = build(overrides | {"crops": {"global_size": 64, "local_size": 32, "local_count": 2, "window": 100}})
        found.append(group_by_slot(take(make_loader(config), 2), config))
    for other in found[1:]:
        assert_same(found[0], other)
    whole = config.model_copy(update={"crops": config.crops.model_copy(update={"window": None})})
    assert not torch.equal(found[0][0][0], group_by_slot(take(make_loader(whole), 1), whole)[0][0])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "crops.window: must be at least 1 (got 0)"),
        (-5, "crops.window: must be at least 1 (got -5)"),
        ("large", "crops.window: must be a whole number (got 'large')"),
        (95, "crops.window 95 is smaller than the smallest crop, which has 96 pixels"),
        (20_000, "crops.window 20000 has 400000000 pixels of 3 channels of uint8, more than 178956970; lower it"),
    ],
)
def test_wrong_values_are_refused_in_one_line(value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build({"crops": {"window": value}})
    assert str(error.value) == message


@pytest.mark.slow
def test_a_huge_image_needs_little_memory(tmp_path: Path) -> None:
    """20 000 x 20 000 pixels have 1.2 GB; the process stays below 500 MB above one that reads a small image."""
    peaks = {}
    for side in (600, 20_000):
        folder = tmp_path / str(side)
        folder.mkdir()
        noise = np.random.default_rng(0).integers(0, 16, (256, 256, 3), np.uint8)
        count = (-(-side // 256)) ** 2
        tifffile.imwrite(
            folder / "x.tif", (noise + number % 200 for number in range(count)), shape=(side, side, 3), dtype=np.uint8,
            tile=(256, 256), photometric="rgb", compression="zlib", compressionargs={"level": 1},
        )  # fmt: skip
        path = indexed(folder / "x.tif", RGB)
        done = subprocess.run([sys.executable, "-c", STREAM, str(path)], capture_output=True, text=True, check=True)
        peaks[side] = int(done.stdout)
    print(peaks)
    assert peaks[20_000] - peaks[600] < 500 << 20


# prints the peak of the resident memory of 32 samples, in bytes
STREAM = """
import itertools, sys
from streamtrain.config.load import build, open_shard_set
from streamtrain.data.loader import Loader
config = build({"data": {"shards": sys.argv[1], "micro_batch": 8}, "crops": {"window": 512}})
with Loader(open_shard_set(config), config, rank=0, world_size=1, device="cpu") as loader:
    assert all(len(batch.slots) == 8 for batch in itertools.islice(loader, 4))
print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024)
"""
