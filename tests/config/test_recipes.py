"""The Gram and high-resolution stages of the 7B recipe have the paper's values."""

from __future__ import annotations

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
    assert [(s.global_size, s.local_size, s.gram_size) for s in config.crop_sizes] == [(256, 112, 512)]


def test_the_high_resolution_stage_alternates_sizes_and_keeps_its_gram_teacher() -> None:
    config = load_config("giant_highres.yaml")
    sizes = [(s.global_size, s.local_size, s.gram_size) for s in config.crop_sizes]
    large = [(768, side, 1152) for side in (112, 160, 224, 336)]
    assert sizes == [(512, 112, 768), *large]
    assert [entry.share for entry in config.crops.sizes] == [0.3, 0.3, 0.3, 0.05, 0.05]
    assert not any(config.objective.gram.refresh.is_due(step) for step in (1_010_000, 1_200_000, 1_210_000))
    assert config.objective.koleo.samples(config.data.micro_batch, 256) == 16
