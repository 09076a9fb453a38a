"""Packing, verification, training and evaluation accept the same image files and see the same pixels."""

from __future__ import annotations

import itertools
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_images import add_to_tar
from image_files import SIDE, drawn_pixels, image_files, png, saved
from PIL import Image

from shards.errors import ShardError
from shards.format.decode import decode
from shards.format.image_header import read_header
from shards.packing.index_tars import index_tars
from shards.packing.pack import PackOptions, pack
from shards.packing.verify import verify
from shards.reading.quarantine import Quarantine
from shards.reading.shard_set import ShardSet
from streamtrain.config.crops import CropsConfig, CropSizes
from streamtrain.config.load import build
from streamtrain.data.augment import draw_views
from streamtrain.data.loader import Loader
from streamtrain.data.pipeline import CropPipeline
from streamtrain.evaluation.images import images_of_set

# crops of the whole image at its own size, without any change of the pixels
WHOLE = {
    "global_size": SIDE, "local_count": 0, "global_scale": [1.0, 1.0], "aspect": [1.0, 1.0], "flip": 0.0, "grey": 0.0,
    "jitter": {"probability": 0.0}, "blur": {"global_probability": [0.0]}, "solarize": {"global_probability": [0.0]},
}  # fmt: skip


def trained_pixels(shard_set: ShardSet, **data: Any) -> tuple[dict[str, np.ndarray], set[str]]:
    """Return the pixels that training sees by key, and the keys in the quarantine, after one epoch."""
    config = build({
        "data": {"shards": str(shard_set.path), "micro_batch": 4, "global_batch": 4, "lanes": 1, "window": 1,
                 "decode_threads": 1, "max_unusable_share": 1.0, **data},
        "crops": WHOLE, "model": {"patch_size": 16, "dim": 32, "depth": 1, "num_heads": 1},
    })  # fmt: skip
    quarantine = Quarantine(max_rate=1.0)
    pixels = {}
    with Loader(shard_set, config, rank=0, world_size=1, device="cpu", quarantine=quarantine) as loader:
        for batch in itertools.islice(loader, -(-shard_set.num_samples // 4)):
            for row, sample in enumerate(loader.describe_samples(batch.slots)):
                pixels[sample["key"]] = batch.global_crops[row].numpy()
    keys = [shard_set.key(shard, index) for shard, size in enumerate(shard_set.sizes) for index in range(size)]
    return pixels, set(keys) - set(pixels)


def decoded_or_none(payload: bytes) -> np.ndarray | None:
    try:
        return decode(payload)
    except ShardError:
        return None


def test_a_tar_of_every_format_is_used_as_verified(tmp_path: Path) -> None:
    files = list(image_files().items())
    with tarfile.open(tmp_path / "web.tar", "w") as tar:
        for number, (_, payload) in enumerate(files):
            add_to_tar(tar, f"{number:04d}.jpg", payload)
    index_tars([str(tmp_path / "web.tar")], tmp_path / "set")
    shard_set = ShardSet.open(tmp_path / "set")
    faults = {fault.key for fault in verify(tmp_path / "set") if fault.index is not None}
    pixels, unusable = trained_pixels(shard_set)
    evaluated = images_of_set(shard_set, np.arange(shard_set.num_samples))
    expected_faults = set()
    for number, (name, payload) in enumerate(files):
        expected, key = decoded_or_none(payload), f"{number:04d}"
        if expected is None:
            expected_faults.add(key)
            with pytest.raises(ValueError):
                evaluated.decode(number)
            continue
        np.testing.assert_array_equal(np.asarray(evaluated.decode(number)), expected, name)
        np.testing.assert_array_equal(pixels.get(key), expected, name)
    named = {number: files[int(number)][0] for number in faults ^ expected_faults}
    assert not named, named
    # cut in the middle of a scan but ended properly: DALI cannot tell
    assert {files[int(key)][0] for key in faults ^ unusable} <= {"JPEG truncated, ended"}
    refused = {files[int(key)][0].split()[0] for key in faults}
    assert refused == {"TIFF", "JPEG", "PNG", "PostScript", "text"} and len(faults) < 20


def test_a_folder_of_every_format_packs_without_a_change_of_pixels(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    files = image_files()
    for number, payload in enumerate(files.values()):
        (tmp_path / "in" / f"{number:04d}.jpg").write_bytes(payload)
    report = pack(tmp_path / "in", tmp_path / "set", PackOptions())
    expected = [pixels for payload in files.values() if (pixels := decoded_or_none(payload)) is not None]
    assert report.num_rejected == len(files) - len(expected)
    assert verify(tmp_path / "set") == []
    shard_set = ShardSet.open(tmp_path / "set")
    pixels, unusable = trained_pixels(shard_set)
    assert not unusable
    for key, image in zip(sorted(pixels), expected, strict=True):
        np.testing.assert_array_equal(pixels[key], image, list(files)[int(key[:9])])


@pytest.mark.parametrize("background", ["white", [10, 200, 30], None])
def test_training_composites_on_the_background(tmp_path: Path, background: Any) -> None:
    (tmp_path / "in").mkdir()
    for channels in (2, 4):
        mode = {2: "LA", 4: "RGBA"}[channels]
        (tmp_path / "in" / f"{mode}.png").write_bytes(saved(Image.fromarray(drawn_pixels(channels), mode), "PNG"))
    (tmp_path / "in" / "plain.png").write_bytes(saved(Image.fromarray(drawn_pixels(3)), "PNG"))
    pack(tmp_path / "in", tmp_path / "set", PackOptions())
    shard_set = ShardSet.open(tmp_path / "set")
    pixels, _ = trained_pixels(shard_set, background=background)
    behind = np.array({"white": (255, 255, 255)}.get(str(background), background) or (0, 0, 0), float)
    for key, channels in (("LA", 2), ("RGBA", 4), ("plain", 3)):
        stored = drawn_pixels(channels).astype(float)
        colors = stored[..., :1].repeat(3, -1) if channels == 2 else stored[..., :3]
        alpha = stored[..., -1:] / 255 if channels % 2 == 0 and background is not None else 1.0
        (seen,) = (image for name, image in pixels.items() if key in name)
        np.testing.assert_array_equal(seen, np.rint(colors * alpha + behind * (1 - alpha)))


def test_decoded_images_join_the_graph_of_a_gpu() -> None:
    crops = CropsConfig(**{**WHOLE, "local_count": 1, "local_size": 32})
    files = image_files()
    names = [name for name in files if decoded_or_none(files[name]) is not None]
    payloads = [files[name] for name in names]
    decoded = {row: decode(each) for row, each in enumerate(payloads) if read_header(each).needs_host}
    assert 20 < len(decoded) < len(payloads) - 20
    sizes = np.tile(np.int32([[SIDE, SIDE]]), (len(payloads), 1))
    views = draw_views(crops, 0, np.arange(len(payloads)), sizes)
    crop_sizes = CropSizes.of(SIDE, 32)
    pipeline = CropPipeline(
        crops, len(payloads), (crop_sizes,), device="cpu", device_id=None, threads=1, prefetch=1, cropping=True
    )
    for rows in (decoded, {}, {row: decode(each) for row, each in enumerate(payloads)}):
        usable = [saved(Image.fromarray(decode(each)), "PNG") for each in payloads] if not rows else payloads
        pipeline.feed([np.frombuffer(each, np.uint8) for each in usable], views, crop_sizes, rows)
        output = torch.from_dlpack(pipeline.take()[0].as_tensor()).numpy().copy()
        pipeline.release()
        for name, payload, pixels in zip(names, payloads, output, strict=True):
            np.testing.assert_array_equal(pixels, decode(payload), name)


def test_images_that_only_the_host_decodes_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training uses an image that packing accepts, although DALI's decoder, of whichever device, fails on it."""
    monkeypatch.setattr(CropPipeline, "take", _fail_where_dali_would(CropPipeline.take))
    monkeypatch.setattr(CropPipeline, "feed", _remember(CropPipeline.feed))
    (tmp_path / "in").mkdir()
    for number in range(12):
        (tmp_path / "in" / f"{number}.png").write_bytes(png(drawn_pixels(3) + np.uint8(number), 2, 8))
    pack(tmp_path / "in", tmp_path / "set", PackOptions())
    pixels, unusable = trained_pixels(ShardSet.open(tmp_path / "set"))
    assert not unusable and len(pixels) == 12


def _fails_on_odd_sizes(payload: np.ndarray) -> str | None:
    return "fails" if int(payload[-20:].sum()) % 2 else None


def _remember(feed: Any) -> Any:
    def remembering(self: Any, payloads: Any, views: Any, sizes: Any, decoded: Any = {}) -> None:  # noqa: B006
        fails = any(_fails_on_odd_sizes(each) for row, each in enumerate(payloads) if row not in decoded)
        self.__dict__.setdefault("fails", []).append(fails)
        feed(self, payloads, views, sizes, decoded)

    return remembering


def _fail_where_dali_would(take: Any) -> Any:
    def failing(self: Any, *arguments: Any) -> Any:
        if self.fails.pop(0):
            raise RuntimeError("DALI fails")
        return take(self, *arguments)

    return failing
