"""Odd and corrupt images through the loader of a device: which are used, which quarantined, and how pixels differ."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.odd_images import SIDE, corrupt_images, good_images, odd_images
from shards.format.decode import decode
from shards.format.image_header import read_header
from shards.packing.index_tars import index_tars
from shards.reading.quarantine import Quarantine
from shards.reading.shard_set import ShardSet
from streamtrain.config.load import build
from streamtrain.config.tree import Config
from streamtrain.data.augment import draw_views
from streamtrain.data.loader import Loader
from streamtrain.data.pipeline import CropPipeline

NUM_GOOD = 24
MICRO_BATCH = 8
# levels of 255: decoders round differently, and a GPU resizes with another filter at the edges of a crop
MEAN_LIMIT, CROP_MEAN_LIMIT = 1.5, 3.0
# of smaller images, a large part of an enlarged crop is near its edges
SHORTEST_SIDE = SIDE // 2
# one crop of the whole image, without any change of its colours
WHOLE = {
    "global_size": SIDE, "local_count": 0, "global_scale": [1.0, 1.0], "flip": 0.0, "grey": 0.0,
    "jitter": {"probability": 0.0}, "blur": {"global_probability": [0.0]}, "solarize": {"global_probability": [0.0]},
}  # fmt: skip

Pixels = npt.NDArray[np.uint8]


def run(device: str) -> dict[str, Any]:
    """Decode all images on ``device`` and on the CPU.

    ``failures`` lists images that are lost or wrongly used, and those whose pixels differ too much.
    """
    corrupt = corrupt_images()
    files = {**good_images(NUM_GOOD), **odd_images(), **corrupt}
    # good, odd and corrupt images share batches
    names = [list(files)[row] for row in np.random.default_rng(0).permutation(len(files))]
    with tempfile.TemporaryDirectory() as folder:
        shard_set = _write_set(Path(folder), [files[name] for name in names])
        config = _build_config(shard_set)
        used, quarantined = _load(shard_set, config, device, Path(folder) / "device.jsonl")
        on_cpu, _ = _load(shard_set, config, "cpu", Path(folder) / "cpu.jsonl")
    crops = {names[int(key)]: pixels for key, pixels in used.items()}
    cpu_crops = {names[int(key)]: pixels for key, pixels in on_cpu.items()}
    reasons = {names[int(key)]: reason for key, reason in quarantined.items()}
    usable = [name for name in names if name not in corrupt]
    decoded, refused = _decode_on(device, config, {name: files[name] for name in usable})
    expected = {name: decode(files[name]) for name in usable}

    failures = [f"{name}: quarantined: {reasons[name]}" for name in usable if name in reasons]
    failures += [f"{name}: lost" for name in usable if name not in crops and name not in reasons]
    failures += [f"{name}: used, but corrupt" for name in corrupt if name in crops]
    failures += [f"{name}: not in the quarantine" for name in corrupt if name not in reasons]
    differences = {name: _difference(decoded[name], expected[name]) for name in decoded}
    failures += [f"{name}: other pixels: {each}" for name, each in differences.items() if each["mean"] > MEAN_LIMIT]
    crop_differences = {name: _difference(crops[name], cpu_crops[name]) for name in usable if name in crops}
    failures += [
        f"{name}: other crop: {each}"
        for name, each in crop_differences.items()
        if each["mean"] > CROP_MEAN_LIMIT and min(expected[name].shape[:2]) >= SHORTEST_SIDE
    ]
    return {
        "images": len(files),
        "odd_images": len(usable) - NUM_GOOD,
        "corrupt_images": len(corrupt),
        "used_images": len(crops),
        "quarantined_images": len(reasons),
        "decoded_by_dali": len(decoded),
        # left to the decoder of the host: by their header, and because DALI failed
        "decoded_by_host": len(usable) - len(decoded) - len(refused),
        "refused_by_dali": refused,
        **_summary("pixel", differences),
        **_summary("crop", crop_differences),
        "differences": {name: each for name, each in differences.items() if each["max"] > 0},
        "quarantine_reasons": reasons,
        "failures": failures,
    }


def _write_set(folder: Path, payloads: list[bytes]) -> ShardSet:
    """Index a tar of the images in place; packing would leave out the corrupt ones."""
    with tarfile.open(folder / "images.tar", "w") as tar:
        for number, payload in enumerate(payloads):
            member = tarfile.TarInfo(f"{number:04d}.jpg")
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
    index_tars([str(folder / "images.tar")], folder / "set")
    return ShardSet.open(folder / "set")


def _build_config(shard_set: ShardSet) -> Config:
    data = {"shards": str(shard_set.path), "micro_batch": MICRO_BATCH, "global_batch": MICRO_BATCH, "lanes": 1}
    data |= {"window": 1, "max_unusable_share": 1.0}
    return build({
        "data": data, "crops": WHOLE, "model": {"patch_size": 16, "dim": 32, "depth": 1, "num_heads": 1},
    })  # fmt: skip


def _load(shard_set: ShardSet, config: Config, device: str, log: Path) -> tuple[dict[str, Pixels], dict[str, str]]:
    """Return the first crop of each image used in one epoch, and the reasons of those in the quarantine, by key."""
    quarantine, crops = Quarantine(log, max_rate=1.0), {}
    with Loader(shard_set, config, rank=0, world_size=1, device=device, quarantine=quarantine) as loader:
        for _ in range(-(-shard_set.num_samples // MICRO_BATCH)):
            batch = next(loader)
            pixels = batch.global_crops[:MICRO_BATCH].cpu().numpy()
            for row, sample in enumerate(loader.describe_samples(batch.slots)):
                crops[sample["key"]] = pixels[row]
    quarantine.close()
    entries = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []
    return crops, {entry["key"]: entry["reason"] for entry in entries}


def _decode_on(device: str, config: Config, files: dict[str, bytes]) -> tuple[dict[str, Pixels], list[str]]:
    """Return the pixels of all images that DALI decodes on ``device``, and the names of images that it refuses."""
    decoded, refused = {}, []
    pipeline = None
    for name in [name for name, payload in files.items() if not read_header(payload).needs_host]:
        pipeline = pipeline or CropPipeline(
            config.crops, 1, config.crop_sizes, device="gpu" if device == "cuda" else "cpu",
            device_id=torch.cuda.current_device() if device == "cuda" else None, threads=2, prefetch=1, cropping=False,
        )  # fmt: skip
        views = draw_views(config.crops, 0, np.arange(1), np.array([[SIDE, SIDE]], np.int32))
        pipeline.feed([np.frombuffer(files[name], np.uint8)], views, config.crop_sizes[0])
        try:
            (images,) = pipeline.take()
        except RuntimeError:
            # a pipeline cannot be used after an error
            refused.append(name)
            pipeline = None
            continue
        images = images.as_cpu() if device == "cuda" else images
        decoded[name] = np.array(images[0])
        pipeline.release()
    return decoded, refused


def _difference(pixels: Pixels, expected: Pixels) -> dict[str, float]:
    """Return the mean and the largest difference, of 255 levels; infinite for images of different sizes."""
    if pixels.shape != expected.shape:
        return {"mean": float("inf"), "max": float("inf")}
    difference = np.abs(pixels.astype(np.int16) - expected)
    return {"mean": round(float(difference.mean()), 4), "max": float(difference.max())}


def _summary(name: str, differences: dict[str, dict[str, float]]) -> dict[str, float]:
    means, largest = ([each[key] for each in differences.values()] for key in ("mean", "max"))
    return {
        f"{name}_difference_mean": float(np.mean(means)),
        f"{name}_difference_highest_mean": max(means),
        f"{name}_difference_max": max(largest),
    }
