"""What DALI makes of images: formats, orientation, boxes and flips; its crops agree with those of the CPU."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from streamtrain.config.crops import CropsConfig, CropSizes
from streamtrain.data.augment import ViewParameters, draw_views
from streamtrain.data.pipeline import CropPipeline, undecodable
from streamtrain.data.views import CpuViews, finish

CROPS = CropsConfig(global_size=48, local_size=32, local_count=2)


def picture(width: int = 90, height: int = 70) -> Image.Image:
    tiles = np.random.default_rng(0).integers(30, 226, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(tiles).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def parameters(count: int) -> ViewParameters:
    return draw_views(CROPS, 0, np.arange(count), np.tile(np.int32([[90, 70]]), (count, 1)))


SIZES = CropSizes(48, 32)


def make(
    batch_size: int, device: str = "cpu", *, cropping: bool, sizes: tuple[CropSizes, ...] = (SIZES,)
) -> CropPipeline:
    return CropPipeline(
        CROPS, batch_size, sizes, device=device, device_id=None if device == "cpu" else 0, threads=1, prefetch=1,
        cropping=cropping,
    )  # fmt: skip


def decode(payloads: list[np.ndarray]) -> list[np.ndarray]:
    pipeline = make(len(payloads), cropping=False)
    pipeline.feed(payloads, parameters(len(payloads)), SIZES)
    return [np.array(image) for image in pipeline.take()[0]]


def test_every_format_decodes_to_what_pillow_sees() -> None:
    images = [
        (picture(), "PNG"), (picture(), "JPEG"), (picture().convert("L"), "JPEG"), (picture().convert("CMYK"), "JPEG"),
        (picture().convert("L"), "PNG"), (picture().convert("P"), "PNG"), (picture().convert("RGBA"), "PNG"),
        (picture(), "WEBP"), (picture(), "TIFF"),
    ]  # fmt: skip
    payloads = [encoded(image, kind) for image, kind in images]
    payloads.append(encoded(picture(), "JPEG", progressive=True))
    for payload, image in zip(payloads, decode(payloads), strict=True):
        expected = np.asarray(Image.open(io.BytesIO(payload.tobytes())).convert("RGB"))
        assert abs(image.astype(int) - expected).mean() < 1


def test_the_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    image = decode([encoded(picture(), "JPEG", exif=exif)])[0]
    assert abs(image.astype(int) - np.asarray(picture().transpose(Image.Transpose.ROTATE_270))).mean() < 3


def crops_of(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """DALI's finished views on the device, and the CPU's: global, local, global, local; as integers."""
    views = parameters(6)
    payloads = [encoded(picture())] * 6
    pipeline = make(6, device, cropping=True)
    pipeline.feed(payloads, views, SIZES)
    crops = [torch.from_dlpack(view.as_tensor()) for view in pipeline.take()]
    cpu_views = CpuViews(CROPS, threads=1)
    expected = cpu_views.make([torch.from_numpy(image) for image in decode(payloads)], views, SIZES)
    cpu_views.close()
    both = [finish(crops[:2], views, 0), finish(crops[2:], views, 2), *expected[:2]]
    return tuple(part.cpu().int() for part in both)


@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_dali_and_the_cpu_make_the_same_views(device: str) -> None:
    dali_global, dali_local, cpu_global, cpu_local = crops_of(device)
    assert dali_global.shape == cpu_global.shape == (12, 48, 48, 3)
    assert dali_local.shape == cpu_local.shape == (12, 32, 32, 3)
    # they differ at the rims of boxes, where DALI's filter sees the pixels beyond
    for dali, cpu in ((dali_global, cpu_global), (dali_local, cpu_local)):
        assert (dali - cpu).abs().float().mean() < 2
        assert (dali - cpu)[:, 6:-6, 6:-6].abs().float().mean() < 1


def test_sizes_alternate_within_one_pipeline_and_gram_crops_come_last() -> None:
    sizes = (CropSizes(48, 32, gram_size=64), CropSizes(64, 16, gram_size=80))
    pipeline = make(3, cropping=True, sizes=sizes)
    views, payloads = parameters(3), [encoded(picture())] * 3
    for chosen in (sizes[0], sizes[1], sizes[0]):
        pipeline.feed(payloads, views, chosen)
        crops = [torch.from_dlpack(view.as_tensor()).clone() for view in pipeline.take()]
        pipeline.release()
        sides = [chosen.global_size] * 2 + [chosen.local_size] * 2 + [chosen.gram_size] * 2
        assert [tuple(crop.shape) for crop in crops] == [(3, side, side, 3) for side in sides]
    alone = make(3, cropping=True, sizes=(CropSizes(64, 16),))
    alone.feed(payloads, views, CropSizes(64, 16))
    # the Gram crop shows the global view's box
    assert torch.equal(torch.from_dlpack(alone.take()[0].as_tensor()), crops[4])


def test_what_cannot_be_decoded_is_told_from_what_can() -> None:
    good = encoded(picture(), "JPEG")
    assert undecodable(good) is None
    assert undecodable(np.frombuffer(b"this is a text file, not a photograph", np.uint8)) is not None
    assert undecodable(good[: len(good) // 2]) is not None
    assert undecodable(good[:0]) is not None
