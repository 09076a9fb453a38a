"""A typical hand-written loader as a baseline: webdataset, Pillow, NumPy, one process, the same views."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import webdataset
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from streamtrain.config.crops import CropsConfig
from streamtrain.config.section import ImageSize
from streamtrain.data.augment import expand_to_views

Views = list[npt.NDArray[np.uint8]]


def batches(set_path: Path, crops: CropsConfig, batch_size: int) -> Iterator[Views]:
    """Yield batches endlessly: one array uint8 [batch_size, height, width, 3] per view."""
    urls = sorted(str(path) for path in (set_path / "shards").glob("*.tar"))
    dataset = webdataset.WebDataset(urls, resampled=True, shardshuffle=False).shuffle(500).decode("pil")
    pending: list[Views] = []
    for image, *_ in dataset.to_tuple("jpg;jpeg;png;webp;tif"):
        pending.append(make_views(image, crops))
        if len(pending) == batch_size:
            yield [np.stack(views) for views in zip(*pending, strict=True)]
            pending = []


def make_views(image: Image.Image, crops: CropsConfig) -> Views:
    """Return all views of one image, augmented with Pillow."""
    blur = expand_to_views(crops, crops.blur.global_probability, crops.blur.local_probability)
    solarize = expand_to_views(crops, crops.solarize.global_probability, 0.0)
    views = []
    for view in range(crops.global_count + crops.local_count):
        is_global = view < crops.global_count
        size, scale = (crops.global_size, crops.global_scale) if is_global else (crops.local_size, crops.local_scale)
        picture = _random_resized_crop(image, size, scale, crops.aspect)
        if random.random() < crops.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if random.random() < crops.jitter.probability:
            picture = _jitter(picture, crops)
        if random.random() < crops.grey:
            picture = ImageOps.grayscale(picture).convert("RGB")
        if random.random() < blur[view]:
            picture = picture.filter(ImageFilter.GaussianBlur(random.uniform(*crops.blur.sigma)))
        if random.random() < solarize[view]:
            picture = ImageOps.solarize(picture, crops.solarize.threshold)
        views.append(np.asarray(picture))
    return views


def _random_resized_crop(
    image: Image.Image, size: ImageSize, scale: tuple[float, float], aspect: tuple[float, float]
) -> Image.Image:
    width, height = image.size
    aspect = (aspect[0] * size.aspect, aspect[1] * size.aspect)
    for _ in range(10):
        area = random.uniform(*scale) * width * height
        ratio = math.exp(random.uniform(math.log(aspect[0]), math.log(aspect[1])))
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            left, top = random.randint(0, width - wide), random.randint(0, height - tall)
            break
    else:
        wide, tall = min(width, round(height * aspect[1])), min(height, round(width / aspect[0]))
        left, top = (width - wide) // 2, (height - tall) // 2
    return image.crop((left, top, left + wide, top + tall)).resize((size.width, size.height), Image.Resampling.BICUBIC)


def _jitter(picture: Image.Image, crops: CropsConfig) -> Image.Image:
    jitter = crops.jitter
    steps = [
        lambda p: ImageEnhance.Brightness(p).enhance(random.uniform(1 - jitter.brightness, 1 + jitter.brightness)),
        lambda p: ImageEnhance.Contrast(p).enhance(random.uniform(1 - jitter.contrast, 1 + jitter.contrast)),
        lambda p: ImageEnhance.Color(p).enhance(random.uniform(1 - jitter.saturation, 1 + jitter.saturation)),
        lambda p: _rotate_hue(p, random.uniform(-jitter.hue, jitter.hue)),
    ]
    random.shuffle(steps)
    for step in steps:
        picture = step(picture)
    return picture


def _rotate_hue(picture: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = picture.convert("HSV").split()
    rotated = np.asarray(hue) + np.array(round(turns * 255)).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(rotated), saturation, value)).convert("RGB")
