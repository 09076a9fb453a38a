"""Warnings of settings without an effect in a run."""

from __future__ import annotations

import pytest

from streamtrain.config.ineffective import ineffective_settings
from streamtrain.config.load import load_config


def lines(*overrides: str, recipe: str = "vits16", num_samples: int = 10_000, ranks: int = 1) -> list[str]:
    return list(ineffective_settings(load_config(recipe, overrides), ranks, num_samples))


@pytest.mark.parametrize("recipe", ["vits16", "vitl16", "quickstart", "photos", "cifar10", "giant"])
def test_recipes_have_no_such_setting(recipe: str) -> None:
    assert lines(recipe=recipe) == []


def test_a_short_run_is_one_line_for_all_schedules_and_one_for_all_intervals() -> None:
    schedules, intervals = lines("run.steps=5", "run.keep_every=10", "monitor.histogram_every=7")
    assert schedules == (
        "run.steps 5 is too short for schedules.lr.warmup 1000, schedules.teacher_temperature.warmup 3000; "
        "lower these settings, or train longer"
    )
    assert intervals == (
        "never due within run.steps 5: run.keep_every 10 with run.checkpoint_every 1000, monitor.histogram_every 7"
    )


@pytest.mark.parametrize("recipe", ["vits16", "quickstart", "photos"])
def test_a_shortened_recipe_does_not_warn_of_its_own_intervals(recipe: str) -> None:
    assert not [line for line in lines("run.steps=5", recipe=recipe) if "never due" in line]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["schedules.lr.delay=99999", "schedules.lr.warmup=2"], "schedules.lr.delay 99999, schedules.lr.warmup 2"),
        (
            ["schedules.lr.warmup=60000", "schedules.lr.tail=60000"],
            "lr.warmup 60000, schedules.lr.tail 60000",
        ),
        (["objective.gram.weight={peak: 2.0, delay: 200000}"], "objective.gram.weight.delay 200000"),
        (["init.freeze_backbone_steps=100000"], "so the backbone never learns"),
        (["monitor.profile.start=200000"], "monitor.profile.start 200000"),
        (["run.keep_every=1500", "run.steps=2900"], "run.keep_every 1500 with run.checkpoint_every 1000"),
        (["evaluation.every=0", "evaluation.best=knn_20"], "evaluation.best knn_20 (evaluation.every is 0)"),
        (["masks.probability=0"], "mask no patch"),
    ],
)
def test_a_setting_beyond_the_run_is_named(overrides: list[str], text: str) -> None:
    assert any(text in line for line in lines(*overrides)), lines(*overrides)


@pytest.mark.parametrize(
    "override",
    [
        # prototypes that are never trained
        "schedules.freeze_last_layer=200000",
        # on purpose: as long as the run
        "schedules.lr.warmup=100000",
        # a constant from its first step
        "schedules.weight_decay={kind: constant, start: 0.04, peak: 0.04, end: null, delay: 200000}",
        "masks.probability=0.1",
    ],
)
def test_a_setting_with_an_effect_is_not_named(override: str) -> None:
    assert lines(override) == []


def test_a_batch_larger_than_the_set_and_a_tiny_set_are_named() -> None:
    assert lines(num_samples=999) != [] and lines(num_samples=1000) == []
    (line,) = lines(num_samples=31, ranks=2)
    assert (
        line.startswith("a batch of 32 images repeats images, because the set has only 31")
        and "data.micro_batch" in line
    )
    (line,) = lines("data.micro_batch=1", num_samples=1)
    assert "the set has 1 image," in line
