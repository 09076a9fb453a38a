"""Images of any channels and depth in the loader: exact values, the laws of the stream, pictures, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tifffile")
from channel_images import ramp, tiff, write_ramps
from data.test_loader import assert_same, group_by_slot, make_loader, take, with_data

from shards.errors import ShardError
from shards.format.pixels import PixelFormat
from shards.format.set_manifest import SetManifest
from shards.packing.pack import PackOptions, pack
from streamtrain.config.crops import CropsConfig, CropSizes
from streamtrain.config.load import build, load_config, open_shard_set
from streamtrain.config.tree import Config
from streamtrain.data.augment import draw_views
from streamtrain.data.batch import normalise
from streamtrain.data.pipeline import CropPipeline, _build_graph
from streamtrain.data.views import CpuViewMaker, recolor_views
from streamtrain.errors import ConfigError
from streamtrain.reporting.panel import batch_panel

PLAIN = {"jitter": {"probability": 0}, "grey": 0, "solarize": {"global_probability": [0]}}
FOUR = PixelFormat(4, "uint16")
Stream = tuple[Config, dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]
StreamOf = Callable[[PixelFormat], Stream]
PERTURBED = {"brightness": 0.3, "contrast": 0.3, "noise": 0.1, "channel_dropout": 0.3}


def small_config(set_path: Path, **crops: Any) -> Config:
    overrides = [f"data.shards={set_path}", "data.micro_batch=4", "data.decode_threads=1", "data.reader_threads=1",
                 "data.lanes=4", "data.window=2", "run.seed=5"]  # fmt: skip
    values = {"mean": "from_set", "std": "from_set", "global_size": 32, "local_size": 16, "local_count": 2} | crops
    overrides += [f"crops.{key}={value}" for key, value in {**values, **PLAIN}.items()]
    return load_config("vits16.yaml", overrides)


@pytest.fixture(scope="module")
def four_bands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 26 images of 4 channels of uint16 and of several sizes, in several shards."""
    folder = tmp_path_factory.mktemp("four")
    for number in range(26):
        tiff(ramp(FOUR, number, 40 + 3 * number, 90 - 2 * number), folder / f"{number:02}.tif", compression="deflate")
    pack(folder, folder / "set", PackOptions(pixels=FOUR, shard_bytes=64 << 10))
    return folder / "set"


@pytest.mark.parametrize("channels", [1, 4, 13])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_crops_without_resampling_have_the_stored_values(tmp_path: Path, channels: int, dtype: str) -> None:
    pixels = PixelFormat(channels, dtype)
    write_ramps(tmp_path / "src", pixels)
    pack(tmp_path / "src", tmp_path / "set", PackOptions(pixels=pixels))
    # of 40 x 32 pixels, the largest square fits
    config = small_config(tmp_path / "set", global_scale=[0.8, 0.8], aspect=[1, 1], local_count=0, flip=0,
                          **{"blur.global_probability": [0]})  # fmt: skip
    (batch,) = take(make_loader(config), 1)
    assert batch.global_crops.dtype == (torch.uint8 if dtype == "uint8" else torch.float32)
    values = ramp(pixels)
    for crop in batch.global_crops.numpy():
        assert any(np.array_equal(crop, values[top : top + 32]) for top in range(9))
    assert sum(map(torch.Tensor.nbytes.__get__, (batch.global_crops, batch.local_crops))) == config.micro_batch_bytes
    planes = normalise(batch.global_crops, config.crops.mean, config.crops.std, torch.float32, config.crops.value_range)
    flat = values.reshape(-1, channels).astype(np.float64)
    expected = (batch.global_crops.double() - torch.from_numpy(flat.mean(0))) / torch.from_numpy(flat.std(0))
    assert torch.allclose(planes.double(), expected.permute(0, 3, 1, 2), atol=1e-5)


@pytest.fixture(scope="module")
def stream_of(tmp_path_factory: pytest.TempPathFactory) -> StreamOf:
    """A function that returns the settings and the first 48 samples of a set of 14 images, which it makes once."""

    @cache
    def make(pixels: PixelFormat) -> Stream:
        folder = tmp_path_factory.mktemp("stream")
        (folder / "src").mkdir()
        for number in range(14):
            np.save(folder / "src" / f"{number:02}.npy", ramp(pixels, number, 24 + number, 40 - number))
        shard_bytes = 4 * 40 * 30 * pixels.num_bytes
        pack(folder / "src", folder / "set", PackOptions(pixels=pixels, shard_bytes=shard_bytes))
        config = small_config(folder / "set", **PERTURBED | ({"channel_dropout": 0} if pixels.channels == 1 else {}))
        config = with_data(config, global_batch=8, micro_batch=8)
        return config, group_by_slot(take(make_loader(config), 6), config)

    return make


STREAMS = {
    "pixels": st.builds(PixelFormat, st.sampled_from([1, 2, 4, 13]), st.sampled_from(["uint8", "uint16", "float32"])),
    "start": st.integers(0, 32), "ranks": st.sampled_from([1, 2, 4]), "micro": st.sampled_from([1, 2]),
    "threads": st.integers(1, 2),
}  # fmt: skip


def check_stream(stream_of: StreamOf, pixels: PixelFormat, start: int, ranks: int, micro: int, threads: int) -> None:
    """Check that two steps from any slot on have the samples of the whole stream, on any ranks and micro-batches."""
    config, whole = stream_of(pixels)
    config = with_data(config, micro_batch=micro, decode_threads=threads)
    loaders = [make_loader(config, rank, ranks, start_slot=start) for rank in range(ranks)]
    taken = [batch for loader in loaders for batch in take(loader, 16 // (ranks * micro))]
    assert_same(group_by_slot(taken, config), {slot: whole[slot] for slot in range(start, start + 16)})


@settings(max_examples=3)
@given(**STREAMS)
def test_a_sample_depends_on_the_slot_only(stream_of: StreamOf, **drawn: Any) -> None:
    check_stream(stream_of, **drawn)


@pytest.mark.slow
@settings(max_examples=80)
@given(**STREAMS)
def test_many_samples_depend_on_the_slot_only(stream_of: StreamOf, **drawn: Any) -> None:
    check_stream(stream_of, **drawn)


@pytest.mark.parametrize("pixels", [FOUR, PixelFormat(13, "uint8"), PixelFormat(1, "float32")], ids=str)
def test_dali_and_cpu_views_agree(pixels: PixelFormat) -> None:
    turns = {"aspect": (1, 1), "flip_vertical": 0.5, "rotate90": 0.75, "mean": [0.5], "std": [0.2]}
    crops = CropsConfig(global_size=32, local_size=16, local_count=1, **turns, **PERTURBED, **PLAIN)
    sizes = CropSizes.of(32, 16)
    rows, columns, channels = np.mgrid[:40, :32, : pixels.channels]
    image = (3 * rows + 2 * columns + channels).astype(pixels.dtype)
    views = draw_views(crops, 0, np.arange(3), np.tile(np.int32([[32, 40]]), (3, 1)), pixels.channels)
    pipeline = CropPipeline(
        crops, 3, [sizes], device="cpu", device_id=None, threads=1, prefetch=1, cropping=True, pixels=pixels
    )
    pipeline.feed([np.zeros(1, np.uint8)] * 3, views, sizes, dict.fromkeys(range(3), image))
    taken = [torch.from_dlpack(view.as_tensor()) for view in pipeline.take()]
    maker = CpuViewMaker(crops, 1, pixels)
    expected, _, _ = maker.make_views([torch.from_numpy(image)] * 3, views, sizes)
    maker.close()
    found = recolor_views(crops, taken[:2], views, 0, pixels)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    # they differ at the edges of boxes, where DALI's filter includes pixels outside the box
    assert (found.double() - expected.double())[:, 6:-6, 6:-6].abs().mean() < 0.5
    for cropping in (True, False):
        _build_graph(
            crops, "gpu", cropping, (sizes,), pixels, batch_size=3, num_threads=1, device_id=0, prefetch_queue_depth=2
        )._build_graph()


def test_pictures_show_the_chosen_channels(four_bands: Path) -> None:
    config = small_config(four_bands)
    (batch,) = take(make_loader(config), 1)
    panels = [
        batch_panel(batch, config.model_copy(update={"monitor": config.monitor.model_copy(update=changes)}))
        for changes in ({}, {"panel_channels": (0, 1, 2)}, {"panel_channels": (3, 1, 0)}, {"panel_channels": (2,)})
    ]
    assert np.array_equal(panels[0], panels[1]) and not np.array_equal(panels[0], panels[2])
    assert all(panel.dtype == np.uint8 and panel.shape == panels[0].shape for panel in panels)


def test_damaged_images_are_named(four_bands: Path, tmp_path: Path) -> None:
    config = small_config(four_bands)
    wrong = config.model_copy(update={"data": config.data.model_copy(update={"channels": 3})})
    with pytest.raises(ConfigError, match=r"images of 4 channels of uint16, .* set data.channels=4 data.dtype=uint16$"):
        open_shard_set(wrong)
    with pytest.raises(ShardError, match=r"10000000000x1 pixels|more than 1000 pixels|is more than"):
        take(make_loader(with_data(config, max_pixels=1000)), 1)


VALUES = {"mean": [0.5], "std": [0.2]}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"crops": {}}, "crops.mean has 3 numbers, but the images have 4 channels of uint16; give one number per "
         "channel, or from_set"),
        ({"crops": VALUES | PLAIN | {"value_range": [[0, 1]] * 2}}, "crops.value_range has 2 pairs"),
        ({"crops": VALUES | PLAIN | {"value_range": [5, 5]}}, "crops.value_range: must be ascending numbers"),
        ({"crops": VALUES}, "crops.jitter.probability, crops.grey, crops.solarize.global_probability: defined for "
         "8-bit RGB only, but the images have 4 channels of uint16; set crops.jitter.probability=0 crops.grey=0 "
         "crops.solarize.global_probability=[0]"),
        ({"crops": VALUES | PLAIN | {"grey": 0.1}}, "crops.grey: defined for 8-bit RGB only"),
        ({"crops": VALUES | PLAIN | {"mean": "from_set"}}, "crops.mean: from_set needs a set of images; give "
         "data.shards"),
        ({"crops": VALUES | PLAIN, "model": {"channels": 3}}, "model.channels is 3, but the images have 4 channels of "
         "uint16; set model.channels=4"),
        ({"data": {"channels": 1}, "crops": VALUES | PLAIN | {"channel_dropout": 0.1}},
         "crops.channel_dropout needs at least 2 channels, because one always remains; set it to 0"),
        ({"data": {"channels": 2}, "crops": VALUES | PLAIN, "init": {"weights": "rgb", "channels": "repeat"}},
         "init.channels=repeat needs at least 3 channels, but the images have 2 channels of uint8; use mean"),
        ({"crops": VALUES | PLAIN, "init": {"channels": "mean"}}, "init.channels has an effect only with init.weights"),
        ({"data": {"dtype": "uint16"}, "crops": VALUES | PLAIN, "init": {"weights": "rgb", "channels": "mean"}},
         "init.channels has no effect, because the images have 3 channels of uint16"),
        ({"data": {"channels": 4, "background": "black"}, "crops": VALUES | PLAIN}, "data.background has an effect"),
        ({"crops": VALUES | PLAIN, "monitor": {"panel_channels": [0, 4, 1]}}, "monitor.panel_channels must be one or "
         "three channels from 0 to 3"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused_in_one_line(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build({"data": {"channels": 4, "dtype": "uint16"}, **sections})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_settings_follow_the_set(four_bands: Path, tmp_path: Path) -> None:
    config = small_config(four_bands)
    assert (config.data.channels, config.data.dtype, config.model.channels) == (4, "uint16", 4)
    assert config.crops.value_range == ((0.0, 65535.0),) and len(config.crops.mean) == 4
    again = build(config.model_dump())
    assert again == config and small_config(four_bands, value_range="[0, 1000]").crops.value_range == ((0.0, 1000.0),)


def test_the_statistics_of_a_mixture_follow_its_weights(tmp_path: Path) -> None:
    pixels, sets, values = PixelFormat(2, "float32"), [], []
    for number, (mean, std) in enumerate(((10, 2), (-5, 1), (300, 40))):
        drawn = np.random.default_rng(number).normal((mean, 0), (std, 5), (3, 32, 32, 2)).astype(np.float32)
        (tmp_path / str(number)).mkdir()
        for index, image in enumerate(drawn):
            np.save(tmp_path / str(number) / f"{index}.npy", image)
        pack(tmp_path / str(number), tmp_path / f"set{number}", PackOptions(pixels=pixels))
        sets.append(tmp_path / f"set{number}")
        values.append(drawn.reshape(-1, 2).astype(np.float64))

    def mixed(weights: tuple[int, ...]) -> CropsConfig:
        shares = ", ".join(f"{{shards: {each}, weight: {w}}}" for each, w in zip(sets, weights, strict=False))
        return small_config(Path(f"[{shares}]"), value_range="[[-100, 400], [0, 10]]").crops

    # each set has equally many pixels, so that repeating them gives the mixture
    joined = np.concatenate([np.tile(each, (n, 1)) for each, n in zip(values, (1, 5, 2), strict=True)])
    found, low, width = mixed((1, 5, 2)), np.array([-100, 0]), np.array([500, 10])
    assert np.allclose(found.mean, (joined.mean(0) - low) / width) and np.allclose(found.std, joined.std(0) / width)
    alone = small_config(sets[0], value_range="[[-100, 400], [0, 10]]").crops
    assert mixed((7,)) == alone
    replace(SetManifest.load(sets[1]), statistics=None).save(sets[1])
    with pytest.raises(ConfigError, match=rf"{sets[1]} has no statistics for from_set; compute them: streamtrain sta"):
        mixed((1, 5, 2))
    other = replace(SetManifest.load(sets[0]), pixels=PixelFormat(2, "uint16"))
    other.save(sets[1])
    with pytest.raises(ConfigError, match=r"set0 has 2 channels of float32, but .*set1 has 2 channels of uint16"):
        mixed((1, 5, 2))
