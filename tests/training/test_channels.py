"""Runs on images of 4 channels of 16 bits: RGB weights, kill and resume, learning from the fourth channel."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tifffile")
from channel_images import tiff
from interop.test_channels import backbone_of
from ranks import ROOT, run_ranks
from tiny_backbone import tiny_backbone, tiny_weights
from tiny_run import command, kill_and_resume, logged
from transformers import AutoModel

from shards.format.pixels import PixelFormat
from shards.packing.pack import PackOptions, pack
from streamtrain.checkpoint import reader as checkpoint
from streamtrain.interop.export import export_backbone
from streamtrain.interop.load import load_backbone

sys.path.insert(0, str(ROOT / "tools"))
from demo_images import checks, dots, marble, rings, stripes

SETTINGS = (
    "crops.value_range=[0,6000]", "crops.mean=from_set", "crops.std=from_set", "crops.jitter.probability=0",
    "crops.grey=0", "crops.solarize.global_probability=[0]",
)  # fmt: skip


def pack_bands(folder: Path, bands: int, each: int) -> Path:
    """Pack images of waves in four classes, which only the fourth of their bands distinguishes."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:40, :40] / 40

    def wave(frequency: float) -> np.ndarray:
        angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
        return np.sin(2 * np.pi * frequency * (np.cos(angle) * columns + np.sin(angle) * rows) + phase)

    for label, frequency in enumerate((1.5, 3, 5, 8)):
        (folder / "src" / str(label)).mkdir(parents=True)
        for number in range(each):
            others = [wave(rng.uniform(1, 8)) for _ in range(3)]
            values = np.stack([*others, wave(frequency) + 0.6 * (label - 1.5)], -1) * 1500 + 3000
            values += rng.normal(0, 100, values.shape)
            tiff(values[..., :bands].astype(np.uint16), folder / "src" / str(label) / f"{number:03}.tif")
    pack(folder / "src", folder / "set", PackOptions(pixels=PixelFormat(bands, "uint16"), shard_bytes=500_000))
    return folder / "set"


def test_a_lora_run_with_an_anchor_starts_from_rgb_weights(tmp_path: Path) -> None:
    shards, weights, run_dir = pack_bands(tmp_path, 4, 2), tiny_weights(tmp_path / "weights"), tmp_path / "run"
    start = (*SETTINGS, f"init.weights={weights}", "run.steps=2", "model.lora={rank: 2, alpha: 4}",
             "objective.anchor.weight=1.0", "objective.gram.weight=1.0", f"objective.gram.teacher={weights}",
             "masks.probability=0", "evaluation.every=2", f"evaluation.train={tmp_path / 'src'}")  # fmt: skip
    ((code, _, errors),) = run_ranks(command(shards, run_dir, *start), 1)
    assert code == 2 and "init.weights: " in errors and "set init.channels to repeat, mean or zero_extra" in errors
    ((code, output, errors),) = run_ranks(command(shards, run_dir, *start, "init.channels=zero_extra"), 1)
    assert code == 0 and "patch embedding: RGB to 4 channels (zero_extra)" in output, errors[-3000:]
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert "eval/knn_10" in last and "left out of the evaluation" not in output + errors
    rgb = tiny_backbone().model.state_dict()["embedding.projection.weight"]
    expected = torch.cat([rgb, torch.zeros(32, 64)], 1)
    for which in ("student", "teacher"):
        assert torch.equal(checkpoint.read_weights(run_dir, 2, which)["backbone.embedding.projection.weight"], expected)
    with checkpoint.open_checkpoint(checkpoint.step_folder(run_dir, 2)) as reader:
        gram = {name: reader.read_full(f"gram/backbone.{name}") for name in tiny_backbone().model.state_dict()}
    assert torch.equal(gram["embedding.projection.weight"], expected)
    assert_grey_has_the_tokens_of_rgb(gram)
    losses = [values["loss/anchor"] for values in logged(run_dir).values()]
    assert losses[0] < 1e-5 < losses[1]
    export_backbone(load_backbone(run_dir), "hf", tmp_path / "hf")
    exported = AutoModel.from_pretrained(tmp_path / "hf")
    assert exported.config.num_channels == 4
    assert torch.equal(exported.state_dict()["embeddings.patch_embeddings.weight"].flatten(1), expected)


def assert_grey_has_the_tokens_of_rgb(state: dict[str, torch.Tensor]) -> None:
    ours, grey = backbone_of(4, "uint16").model, torch.rand(2, 1, 32, 32)
    ours.load_state_dict(state)
    pixels = grey.expand(-1, 4, -1, -1), grey.expand(-1, 3, -1, -1)
    found, expected = (
        model([each])[0].patches for model, each in zip((ours, tiny_backbone().model), pixels, strict=True)
    )
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_two_killed_ranks_resume_bit_for_bit(tmp_path: Path) -> None:
    shards = pack_bands(tmp_path, 4, 10)
    settings = (*SETTINGS, "run.steps=8", "run.checkpoint_every=2")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert [code for code, _, _ in run_ranks(command(shards, straight, *settings), 2)] == [0, 0]
    kill_and_resume(command(shards, broken, *settings), broken, 4)
    assert logged(broken) == logged(straight)


def pack_textures(folder: Path, bands: int, each: int = 240) -> Path:
    """Pack images of one of five textures in the fourth of their bands; the others are noise.

    Mean and variance of the fourth band are the same in every image; phase, orientation, scale and sign are random. The
    images of three bands are those of four without the last band.
    """
    rng = np.random.default_rng(0)
    y, x = (np.mgrid[:56, :56] / 28 - 1).astype(np.float32)
    for texture in (stripes, checks, dots, rings, marble):
        source = folder / "src" / texture.__name__
        source.mkdir(parents=True)
        for number in range(each):
            turn, period, sign = rng.uniform(0, 2 * np.pi), rng.uniform(0.18, 0.36), rng.choice([-1, 1])
            u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
            shift = rng.uniform(-4, 4, 2)
            drawn = texture(u / period + shift[0], v / period + shift[1])
            values = rng.normal(0, 0.3, (*drawn.shape, 4))
            values[..., 3] += sign * (drawn - drawn.mean()) / drawn.std()
            tiff((values[..., :bands] * 600 + 3000).astype(np.uint16), source / f"{number}.tif")
    pack(folder / "src", folder / "set", PackOptions(pixels=PixelFormat(bands, "uint16")))
    return folder / "set"


@pytest.mark.slow
def test_training_learns_from_the_fourth_band(tmp_path: Path) -> None:
    trained, untrained, by_pixels = {}, {}, {}
    for bands in (3, 4):
        run_dir = tmp_path / str(bands) / "run"
        words = [
            str(ROOT / "streamtrain" / "main.py"), "--config", "quickstart.yaml", f"run.dir={run_dir}", *SETTINGS,
            "crops.mean=[0.5]", "crops.std=[0.1]",
            f"data.shards={pack_textures(tmp_path / str(bands), bands)}", "crops.local_count=2", "run.steps=150",
            "schedules.lr={kind: cosine, peak: 1e-3, end: 1e-5, warmup: 20}", "run.checkpoint_every=0",
            "evaluation.every=150", "evaluation.images=960", "evaluation.max_share=1", "monitor.progress=false",
            "monitor.tensorboard=false", "engine.device=cpu",
        ]  # fmt: skip
        ((code, _, errors),) = run_ranks(words, 1, timeout=900)
        assert code == 0, errors[-3000:]
        last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        baselines = json.loads((run_dir / "baselines.json").read_text())
        trained[bands] = last["eval/knn_20"]
        untrained[bands], by_pixels[bands] = (baselines[name]["eval/knn_20"] for name in ("start", "pixels"))
    print(trained, untrained, by_pixels)
    assert trained[4] >= trained[3] + 0.3 and trained[4] > max(untrained[4], by_pixels[4]) + 0.1
