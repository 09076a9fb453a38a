"""The CPU's crops against Pillow's, and that a sample's pixels do not depend on its batch or on threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event

import numpy as np
import torch
from PIL import Image

from streamtrain.config.crops import CropsConfig, CropSizes
from streamtrain.data.appearance import Appearance, adjust
from streamtrain.data.augment import draw_views
from streamtrain.data.views import CpuViews, crop, finish
from streamtrain.ops.logits import scaled_logits

CROPS = CropsConfig(global_size=64, local_size=32, local_count=3)


def images(count: int) -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(0, 256, (90 + 5 * k, 120 - 3 * k, 3), dtype=np.uint8)) for k in range(count)]


def test_crops_are_pillows() -> None:
    image = images(1)[0]
    out = torch.empty(3, 40, 40, dtype=torch.uint8)
    box = (9, 7, 54, 81)
    expected = Image.fromarray(image.numpy()).crop(box).resize((40, 40), Image.Resampling.BICUBIC)
    for mirror in (False, True):
        crop(image.permute(2, 0, 1)[None], (7, 9), (81, 54), mirror=mirror, out=out)
        wanted = np.asarray(expected)[:, ::-1] if mirror else np.asarray(expected)
        # white noise: what is clipped between the two passes depends on which comes first
        assert abs(out.permute(1, 2, 0).numpy().astype(int) - wanted).mean() < 0.5


def test_rows_are_view_major_and_do_not_depend_on_the_batch() -> None:
    pictures = images(5)
    sizes = np.array([[p.shape[1], p.shape[0]] for p in pictures], np.int32)
    views = draw_views(CROPS, 3, np.arange(5), sizes)
    before = torch.get_num_threads()
    workers = CpuViews(CROPS, threads=2)
    torch.rand(2**17).exp()  # of a size that is spread over threads
    numbers = [workers.submit(lambda: (torch.rand(2**17).exp(), torch.get_num_threads())[1]) for _ in range(4)]
    assert {number.result() for number in numbers} == {1}
    sizes = CropSizes(64, 32, gram_size=48)
    together = workers.make(pictures, views, sizes)
    assert together[2].shape == (10, 48, 48, 3)
    assert together[0].shape == (10, 64, 64, 3) and together[1].shape == (15, 32, 32, 3)
    for row, picture in enumerate(pictures):
        alone = workers.make([picture], views.rows(slice(row, row + 1)), sizes)
        for whole, one in zip(together, alone, strict=True):
            assert torch.equal(whole[row::5], one)
    workers.close()
    assert torch.get_num_threads() == before


def test_finish_is_the_same_colouring_for_a_whole_batch() -> None:
    pictures = [p[:64, :64].contiguous() for p in images(4)]
    sizes = np.full((4, 2), 64, np.int32)
    views = draw_views(CROPS, 3, np.arange(4), sizes)
    views.roi_start[:], views.roi_end[:], views.mirror[:] = 0, 1, 0
    workers = CpuViews(CROPS, threads=1)
    expected = workers.make(pictures, views, CropSizes(64, 32))[0]
    workers.close()
    crops = torch.stack(pictures)
    assert torch.equal(finish([crops, crops], views, 0), expected)


def test_gram_crops_are_the_global_boxes_without_their_colours() -> None:
    pictures = images(3)
    sizes = np.array([[p.shape[1], p.shape[0]] for p in pictures], np.int32)
    views = draw_views(CROPS, 3, np.arange(3), sizes)
    plain = replace(
        views, color=np.broadcast_to(np.float32([1, 1, 1, 0]), views.color.shape).copy(),
        sigma=np.zeros_like(views.sigma), solarize=np.full_like(views.solarize, 256),
    )  # fmt: skip
    workers = CpuViews(CROPS, threads=1)
    coloured, _, gram = workers.make(pictures, views, CropSizes(64, 32, gram_size=64))
    uncoloured, _, none = workers.make(pictures, plain, CropSizes(64, 32))
    workers.close()
    assert none is None and torch.equal(gram, uncoloured) and not torch.equal(gram, coloured)


def test_the_training_beside_it_changes_no_pixel() -> None:
    crops = torch.rand(4, 3, 96, 96).mul_(255).round_()
    looks = Appearance.of(
        np.tile(np.float32([1.2, 0.8, 1.1, 10]), (4, 1)), np.full(4, 1.3, np.float32), np.full(4, 256, np.int32), 96
    )
    expected = adjust(crops, looks)
    features, prototypes = torch.randn(256, 64).bfloat16(), torch.randn(8192, 64).bfloat16()
    stop = Event()

    def train() -> None:
        while not stop.is_set():
            scaled_logits(features, prototypes, 0.1)

    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train)
        same = [torch.equal(adjust(crops, looks), expected) for _ in range(50)]
        stop.set()
        training.result()
    assert all(same)
