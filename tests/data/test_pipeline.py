"""What the DALI graph makes of images: formats, boxes, flips, colours, blur, solarize."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from streamtrain.config.crops import CropsConfig, SolarizeConfig
from streamtrain.data.augment import NO_SOLARIZE, ViewParameters
from streamtrain.data.pipeline import ViewPipeline, undecodable

SIZE = 48
CROPS = CropsConfig(
    global_count=1, global_size=SIZE, local_count=0, solarize=SolarizeConfig(global_probability=(0.5,))
)


def picture(width: int = 90, height: int = 70) -> Image.Image:
    tiles = np.random.default_rng(0).integers(30, 226, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(tiles).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def parameters(count: int) -> ViewParameters:
    """Views that show the whole image as it is."""
    return ViewParameters(
        roi_start=np.zeros((count, 1, 2), np.float32),
        roi_end=np.ones((count, 1, 2), np.float32),
        color=np.tile(np.float32([1, 1, 1, 0]), (count, 1, 1)),
        sigma=np.zeros((count, 1), np.float32),
        solarize=np.full((count, 1), NO_SOLARIZE, np.int32),
        mirror=np.zeros((count, 1), np.int32),
    )


def views_of(payloads: list[np.ndarray], views: ViewParameters, crops: CropsConfig = CROPS) -> np.ndarray:
    """The only view of each image, int [B, size, size, 3]."""
    pipeline = ViewPipeline(crops, len(payloads), device="cpu", device_id=None, threads=1, prefetch=1)
    pipeline.feed(payloads, views)
    return np.array(pipeline.views()[0].as_tensor()).astype(int)


def whole(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(int)


def test_every_format_decodes_to_what_pillow_sees() -> None:
    images = [
        (picture(), "PNG"), (picture(), "JPEG"), (picture().convert("L"), "JPEG"), (picture().convert("CMYK"), "JPEG"),
        (picture().convert("L"), "PNG"), (picture().convert("P"), "PNG"), (picture().convert("RGBA"), "PNG"),
        (picture(), "WEBP"), (picture(), "TIFF"),
    ]
    payloads = [encoded(image, kind) for image, kind in images]
    payloads.append(encoded(picture(), "JPEG", progressive=True))
    views = views_of(payloads, parameters(len(payloads)))
    for payload, view in zip(payloads, views, strict=True):
        assert abs(view - whole(Image.open(io.BytesIO(payload.tobytes())))).mean() < 1


def test_the_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    views = views_of([encoded(picture(), "JPEG", exif=exif)], parameters(1))
    assert abs(views[0] - whole(picture().transpose(Image.Transpose.ROTATE_270))).mean() < 3


def test_boxes_and_flips() -> None:
    views = parameters(2)
    views.roi_start[:, 0] = np.float32([[7 / 70, 9 / 90]] * 2)
    views.roi_end[:, 0] = np.float32([[63 / 70, 54 / 90]] * 2)
    views.mirror[1] = 1
    plain, flipped = views_of([encoded(picture())] * 2, views)
    assert abs(plain - whole(picture().crop((9, 7, 54, 63)))).max() <= 2
    assert abs(flipped - plain[:, ::-1]).max() <= 1


def test_colours_are_one_linear_map() -> None:
    views = parameters(4)
    views.color[1, 0] = [1.2, 0.7, 1, 0]
    views.color[2, 0] = [1, 1, 0, 0]
    views.color[3, 0] = [1, 1, 1, 30]
    plain, bright, grey, turned = views_of([encoded(picture())] * 4, views)
    assert abs(bright - np.clip(1.2 * (128 + 0.7 * (plain - 128)), 0, 255)).max() <= 1
    luma = plain @ [0.299, 0.587, 0.114]
    assert abs(grey - luma[..., None]).max() <= 2
    # a turned hue keeps the luma, up to what is clipped
    assert abs(turned @ [0.299, 0.587, 0.114] - luma).mean() < 3 and abs(turned - plain).mean() > 10


@pytest.mark.parametrize("sigma", [0.3, 0.8, 1.4, 2.0])
def test_blur_is_gaussian_with_a_window_of_nine_at_most(sigma: float) -> None:
    views = parameters(2)
    views.sigma[1] = sigma
    plain, blurred = views_of([encoded(picture())] * 2, views)
    offsets = np.arange(-4, 5)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    expected = plain.astype(float)
    for axis in (0, 1):
        around = [(4, 4) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(expected, around, mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 9, axis)
        expected = windows @ (kernel / kernel.sum())
    assert abs(blurred - expected).max() <= 1


def test_solarize_inverts_what_is_bright() -> None:
    views = parameters(2)
    views.solarize[1] = 128
    plain, solarized = views_of([encoded(picture())] * 2, views)
    assert np.array_equal(solarized, np.where(plain >= 128, 255 - plain, plain))
    assert (plain >= 128).any() and (plain < 128).any()


def test_colour_comes_before_blur_and_solarize_last() -> None:
    views = parameters(2)
    views.color[:, 0] = [1.4, 1.4, 1, 0]  # clips, so that the order shows
    views.sigma[:] = 1.5
    views.solarize[1] = 128
    blurred, solarized = views_of([encoded(picture())] * 2, views)
    bright = Image.fromarray(np.clip(1.4 * (128 + 1.4 * (whole(picture()) - 128)), 0, 255).round().astype(np.uint8))
    assert abs(blurred - np.asarray(bright.filter(ImageFilter.GaussianBlur(1.5))).astype(int)).mean() < 2
    assert np.array_equal(solarized, np.where(blurred >= 128, 255 - blurred, blurred))


def test_what_cannot_be_decoded_is_told_from_what_can() -> None:
    good = encoded(picture(), "JPEG")
    assert undecodable(good) is None
    assert undecodable(np.frombuffer(b"this is a text file, not a photograph", np.uint8)) is not None
    assert undecodable(good[: len(good) // 2]) is not None
    assert undecodable(good[:0]) is not None


@pytest.mark.gpu
def test_the_gpu_makes_nearly_the_same_views() -> None:
    import torch

    views = parameters(4)
    views.color[1:, 0] = [1.2, 0.7, 0.9, 20]
    views.sigma[2:] = 1.1
    views.solarize[3] = 128
    payloads = [encoded(picture(), "JPEG", quality=95)] * 4
    expected = views_of(payloads, views)
    pipeline = ViewPipeline(CROPS, 4, device="gpu", device_id=0, threads=1, prefetch=1)
    pipeline.feed(payloads, views)
    result = torch.from_dlpack(pipeline.views()[0].as_tensor()).cpu().numpy().astype(int)
    assert abs(result - expected).mean() < 2  # the decoders differ in chroma upsampling
