"""The DALI graph: formats, orientation, boxes, flips, and agreement of its crops with the CPU crops."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_images import encoded
from PIL import Image
from ranks import ROOT

from streamtrain.config.crops import CropsConfig, CropSizes
from streamtrain.config.load import load_config
from streamtrain.data.augment import ViewParameters, draw_views
from streamtrain.data.pipeline import CropPipeline, _build_graph
from streamtrain.data.views import CpuViewMaker, recolor_views

CROPS = CropsConfig(global_size=[40, 56], local_size=[32, 24], local_count=2)


def picture(width: int = 90, height: int = 70) -> Image.Image:
    tiles = np.random.default_rng(0).integers(30, 226, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(tiles).resize((width, height), Image.Resampling.BICUBIC)


def payload(image: Image.Image, kind: str = "PNG", **options: object) -> np.ndarray:
    return np.frombuffer(encoded(image, kind, **options), np.uint8)


def parameters(count: int) -> ViewParameters:
    return draw_views(CROPS, 0, np.arange(count), np.tile(np.int32([[90, 70]]), (count, 1)))


SIZES = CropSizes(CROPS.global_size, CROPS.local_size)


def make_pipeline(
    batch_size: int, device: str = "cpu", *, cropping: bool, sizes: tuple[CropSizes, ...] = (SIZES,)
) -> CropPipeline:
    return CropPipeline(
        CROPS, batch_size, sizes, device=device, device_id=None if device == "cpu" else 0, threads=1, prefetch=1,
        cropping=cropping,
    )  # fmt: skip


def decode(payloads: list[np.ndarray]) -> list[np.ndarray]:
    pipeline = make_pipeline(len(payloads), cropping=False)
    pipeline.feed(payloads, parameters(len(payloads)), SIZES)
    return [np.array(image) for image in pipeline.take()[0]]


def test_every_format_decodes_like_pillow() -> None:
    images = [
        (picture(), "PNG"), (picture(), "JPEG"), (picture().convert("L"), "JPEG"), (picture().convert("CMYK"), "JPEG"),
        (picture().convert("L"), "PNG"), (picture().convert("P"), "PNG"), (picture().convert("RGBA"), "PNG"),
        (picture(), "WEBP"), (picture(), "TIFF"),
    ]  # fmt: skip
    payloads = [payload(image, kind) for image, kind in images]
    payloads.append(payload(picture(), "JPEG", progressive=True))
    for each, image in zip(payloads, decode(payloads), strict=True):
        expected = np.asarray(Image.open(io.BytesIO(each.tobytes())).convert("RGB"))
        assert abs(image.astype(int) - expected).mean() < 1


def test_the_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # display rotated by 90 degrees clockwise
    image = decode([payload(picture(), "JPEG", exif=exif)])[0]
    assert abs(image.astype(int) - np.asarray(picture().transpose(Image.Transpose.ROTATE_270))).mean() < 3


def make_views_on(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return DALI's views on the device and the CPU's (global, local, global, local) as integers."""
    views = parameters(6)
    payloads = [payload(picture())] * 6
    pipeline = make_pipeline(6, device, cropping=True)
    pipeline.feed(payloads, views, SIZES)
    crops = [torch.from_dlpack(view.as_tensor()) for view in pipeline.take()]
    cpu_views = CpuViewMaker(CROPS, threads=1)
    expected = cpu_views.make_views([torch.from_numpy(image) for image in decode(payloads)], views, SIZES)
    cpu_views.close()
    views_of_both = [
        recolor_views(CROPS, crops[:2], views, 0),
        recolor_views(CROPS, crops[2:], views, 2),
        *expected[:2],
    ]
    return tuple(part.cpu().int() for part in views_of_both)


@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_dali_and_cpu_views_agree(device: str) -> None:
    dali_global, dali_local, cpu_global, cpu_local = make_views_on(device)
    assert dali_global.shape == cpu_global.shape == (12, 40, 56, 3)
    assert dali_local.shape == cpu_local.shape == (12, 32, 24, 3)
    # they differ at the edges of boxes, where DALI's filter includes pixels outside the box
    for dali, cpu in ((dali_global, cpu_global), (dali_local, cpu_local)):
        assert (dali - cpu).abs().float().mean() < 2
        assert (dali - cpu)[:, 6:-6, 6:-6].abs().float().mean() < 1


def test_sizes_alternate_within_one_pipeline_and_gram_crops_are_last() -> None:
    sizes = (CropSizes.of([40, 56], 32, [64, 80]), CropSizes.of([64, 80], [16, 32], 80))
    pipeline = make_pipeline(3, cropping=True, sizes=sizes)
    views, payloads = parameters(3), [payload(picture())] * 3
    for chosen in (sizes[0], sizes[1], sizes[0]):
        pipeline.feed(payloads, views, chosen)
        crops = [torch.from_dlpack(view.as_tensor()).clone() for view in pipeline.take()]
        pipeline.release()
        shapes = [chosen.global_size] * 2 + [chosen.local_size] * 2 + [chosen.gram_size] * 2
        assert [tuple(crop.shape) for crop in crops] == [(3, *size, 3) for size in shapes]
    single = make_pipeline(3, cropping=True, sizes=sizes[1:])
    single.feed(payloads, views, sizes[1])
    # the Gram crop has the global view's box
    assert torch.equal(torch.from_dlpack(single.take()[0].as_tensor()), crops[4])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_graph_of_a_gpu_is_built_up_to_its_driver(path: Path) -> None:
    """Arguments, devices and edges of the graph for every recipe; nothing is decoded."""
    config = load_config(str(path), [])
    for cropping in (True, False):
        graph = _build_graph(
            config.crops, "gpu", cropping, tuple(config.crop_sizes), batch_size=4, num_threads=1, device_id=0,
            prefetch_queue_depth=2,
        )  # fmt: skip
        graph._build_graph()
        gram = config.crops.global_count if config.crop_sizes[0].gram_size else 0
        views = config.crops.global_count + config.crops.local_count + gram if cropping else 1
        assert [output.device for output in graph._graph_outputs] == ["gpu"] * views
