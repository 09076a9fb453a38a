"""webdataset and DALI read the sets without conversion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import webdataset
from drawn_images import drawn_image, encoded, packed_set
from PIL import Image, ImageOps

from shards.packing.pack import PackOptions, pack
from shards.reading.shard_set import ShardSet


def test_webdataset_reads_the_tars(tmp_path: Path) -> None:
    shard_set = packed_set(tmp_path, 30, ("cat", "dog"))
    urls = [str(shard_set.tar_path(shard)) for shard in range(len(shard_set.sizes))]
    assert len(urls) > 1
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len({sample["__key__"] for sample in samples}) == 30
    ours = [(shard, sample) for shard, size in enumerate(shard_set.sizes) for sample in range(size)]
    for read_sample, (shard, sample) in zip(samples, ours, strict=True):
        assert read_sample["__key__"] == shard_set.key(shard, sample)
        assert read_sample["jpg"] == shard_set.read(shard, sample)
        assert int(read_sample["cls"]) == shard_set.record(shard, sample)["label"]
    decoded = next(iter(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg", "cls")))
    assert decoded[0].size == (32, 24)
    assert decoded[1] == 0


def test_dali_reader_reads_the_tars_and_index(tmp_path: Path) -> None:
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali.pipeline import Pipeline

    shard_set = packed_set(tmp_path, 30, ("cat", "dog"))
    tars = [str(shard_set.tar_path(shard)) for shard in range(len(shard_set.sizes))]
    indexes = [str(shard_set.index_path(shard).with_suffix(".idx")) for shard in range(len(shard_set.sizes))]
    pipeline = Pipeline(batch_size=30, num_threads=1, device_id=None)
    with pipeline:
        images, labels = fn.readers.webdataset(paths=tars, index_paths=indexes, ext=["jpg", "cls"])
        pipeline.set_outputs(images, labels)
    pipeline.build()
    images, labels = pipeline.run()
    ours = [(shard, sample) for shard, size in enumerate(shard_set.sizes) for sample in range(size)]
    for row, (shard, sample) in enumerate(ours):
        assert images.at(row).tobytes() == shard_set.read(shard, sample)
        assert int(labels.at(row).tobytes()) == shard_set.record(shard, sample)["label"]


def test_dali_decodes_packed_images_to_the_size_in_the_index(tmp_path: Path) -> None:
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import types
    from nvidia.dali.pipeline import Pipeline

    folder = tmp_path / "images"
    folder.mkdir()
    image, exif = drawn_image(5), drawn_image(5).getexif()
    exif[0x0112] = 6
    for mode in ("L", "RGB", "CMYK"):
        (folder / f"jpeg {mode}.jpg").write_bytes(encoded(image.convert(mode)))
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        (folder / f"png {mode}.png").write_bytes(encoded(image.convert(mode), "PNG"))
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK"):
        (folder / f"tiff {mode}.tif").write_bytes(encoded(image.convert(mode), "TIFF"))
    turned = image.rotate(90)
    for name, kind, settings in [
        ("sideways.jpg", "JPEG", {"exif": exif}),
        ("sideways.png", "PNG", {"exif": exif}),
        ("sideways.webp", "WEBP", {"exif": exif, "lossless": True}),
        ("sideways.tif", "TIFF", {"exif": exif}),
        ("progressive.jpg", "JPEG", {"progressive": True}),
        ("pair.jpg", "MPO", {"save_all": True, "append_images": [turned]}),
        ("moving.webp", "WEBP", {"save_all": True, "append_images": [turned], "lossless": True}),
        ("moving.gif", "GIF", {"save_all": True, "append_images": [turned]}),
        ("plain.bmp", "BMP", {}),
    ]:
        (folder / name).write_bytes(encoded(image, kind, **settings))
    report = pack(folder, tmp_path / "set", PackOptions())
    assert report.num_rejected == 0
    shard_set = ShardSet.open(tmp_path / "set")

    payloads = [np.frombuffer(shard_set.read(0, sample), np.uint8) for sample in range(shard_set.num_samples)]
    pipeline = Pipeline(batch_size=len(payloads), num_threads=1, device_id=None)
    with pipeline:
        encoded_images = fn.external_source(source=[payloads], cycle=True, dtype=types.UINT8, ndim=1)
        pipeline.set_outputs(fn.decoders.image(encoded_images, device="cpu", output_type=types.RGB))
    pipeline.build()
    (decoded,) = pipeline.run()
    names = sorted(path.name for path in folder.iterdir())
    for sample, name in enumerate(names):
        ours, record = decoded.at(sample), shard_set.record(0, sample)
        assert ours.shape[:2] == (record["height"], record["width"]), name
        with Image.open(folder / name) as picture:
            shown = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
        assert np.abs(ours.astype(int) - shown).max() <= 2, name
