"""The later stages of the 7B recipe have the paper's values; the recipe for photographs suits a laptop and one GPU."""

from __future__ import annotations

import pytest
from commands import exit_status

from streamtrain.config.crops import CropSizes
from streamtrain.config.load import load_config
from streamtrain.config.schedules import value_at


def test_the_gram_stage_refreshes_three_times_and_ramps_its_weights() -> None:
    config = load_config("giant_gram.yaml")
    gram, steps = config.objective.gram, config.run.steps
    due = [step for step in range(0, steps, 1000) if gram.refresh.is_due(step)]
    assert due == [1_010_000, 1_020_000, 1_030_000] and not gram.refresh.is_due(1_010_001)
    at = [value_at(gram.weight, step, steps) for step in (0, 1_000_000, 1_000_500, 1_001_000, steps)]
    assert at == [0.0, 0.0, 1.0, 2.0, 2.0]
    local = config.objective.global_loss.local_weight
    assert [value_at(local, step, steps) for step in (0, 1_000_000, 1_001_000)] == [1.0, 1.0, 0.5]
    assert config.crop_sizes == (CropSizes.of(256, 112, 512),)


def test_the_high_resolution_stage_alternates_sizes_and_keeps_its_gram_teacher() -> None:
    config = load_config("giant_highres.yaml")
    large = [CropSizes.of(768, side, 1152) for side in (112, 160, 224, 336)]
    assert config.crop_sizes == (CropSizes.of(512, 112, 768), *large)
    assert [entry.share for entry in config.crops.sizes] == [0.3, 0.3, 0.3, 0.05, 0.05]
    assert not any(config.objective.gram.refresh.is_due(step) for step in (1_010_000, 1_200_000, 1_210_000))
    assert config.objective.koleo.samples(config.data.micro_batch, 256) == 16


def test_the_recipe_for_photographs_suits_a_laptop_and_one_gpu_without_further_settings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = load_config("photos.yaml")
    # the CPU kernels need multiples of 32
    assert config.model.dim // config.model.num_heads == 64
    assert config.engine.dtype == "auto" and config.batch_split(1) == (32, 1)
    given = ["plan", "--config", "photos.yaml", "--gpus", "1", "--gpu-memory", "4GB", "--host-memory", "4GB"]
    assert exit_status(given) == 0
    assert "does not fit" not in capsys.readouterr().out


def test_the_prototypes_of_the_recipe_for_photographs_keep_the_norm_that_its_temperatures_assume() -> None:
    config = load_config("photos.yaml")
    assert config.schedules.freeze_last_layer >= 100 * config.run.steps
    bottleneck = config.objective.global_loss.head.bottleneck
    assert config.objective.patch_loss.head.bottleneck == bottleneck
    # 0.1 times the norm of the prototypes: that of values drawn with a standard deviation of 0.02
    assert abs(config.objective.student_temperature - 0.1 * 0.02 * bottleneck**0.5) < 1e-4


@pytest.mark.parametrize("recipe", ["continue.yaml", "continue_lora.yaml"])
def test_the_recipes_for_released_weights_protect_them(recipe: str) -> None:
    config = load_config(recipe)
    steps, objective = config.run.steps, config.objective
    assert objective.anchor.is_active and (config.optim.layer_decay < 0.9 or config.model.lora.rank > 0)
    assert 0 < config.schedules.lr.warmup < config.init.freeze_backbone_steps < steps / 2
    assert config.evaluation.stop_if_below == 0.9 and 0 < config.evaluation.every <= steps / 4
    bottleneck = objective.global_loss.head.bottleneck
    assert objective.patch_loss.head.bottleneck == bottleneck and config.schedules.freeze_last_layer >= 100 * steps
    # 0.1 times the norm of the prototypes, as above
    assert abs(objective.student_temperature - 0.1 * 0.02 * bottleneck**0.5) < 1e-4


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_the_recipe_for_bands_takes_any_channels(channels: int) -> None:
    config = load_config("multispectral.yaml", [f"data.channels={channels}", "data.dtype=uint16"])
    assert config.model.channels == channels and config.crops.value_range == ((0.0, 10_000.0),)
