from __future__ import annotations

import math
from typing import Any

import pytest

from streamtrain.config.load import load_config
from streamtrain.evaluation.health import USED_TAGS, HealthFinding, judge_health

STEPS = 100
CONFIG = load_config("quickstart.yaml", [f"run.steps={STEPS}", "data.shards=set", "monitor.collapse.every=10"])
UNIFORM = math.log(CONFIG.objective.global_loss.head.prototypes)


def verdict(changed: dict[str, Any], steps: int = STEPS) -> HealthFinding:
    """Judge a healthy run with the tags ``changed``: values, or functions of the step."""
    normal: dict[str, Any] = {
        "loss/global": lambda step: 4 + 1 / step, "loss/patch": lambda step: 2 + 1 / step, "optim/skipped_steps": 0.0,
        "optim/gradient_norm": 2.0, "teacher/temperature": 0.003,
    }  # fmt: skip
    measured = {
        "features/rank": 12.0, "features/std": 0.8, "teacher/entropy": 4.0, "watch/collapse": 0.0,
        "data/pixel_mean": 0.1, "data/pixel_std": 1.1, "data/pixel_structure": 0.6, "data/view_correlation": 0.4,
    }  # fmt: skip
    records = []
    for step in range(1, steps + 1):
        tags = normal | (measured if step == 1 or step % 10 == 0 else {})
        tags = {tag: changed.get(tag, value) for tag, value in tags.items()}
        assert tags.keys() <= {*USED_TAGS, "watch/collapse"}
        records.append({"step": step} | {tag: each(step) if callable(each) else each for tag, each in tags.items()})
    return judge_health(records, CONFIG)


@pytest.mark.parametrize(
    ("expected", "changed", "words"),
    [
        ("healthy", {}, "teacher/entropy at 82%"),
        ("inputs", {"data/pixel_std": 60.0}, "data/pixel_std"),
        ("inputs", {"data/pixel_mean": -2.1}, "data/pixel_mean"),
        ("inputs", {"data/pixel_structure": 0.05}, "data/pixel_structure"),
        ("inputs", {"data/view_correlation": lambda step: 0.1 * math.sin(step)}, "data/view_correlation"),
        ("entropy collapse", {"teacher/entropy": UNIFORM}, "lower schedules.teacher_temperature"),
        ("entropy collapse", {"teacher/entropy": lambda step: 3.0 / step**3}, "at 0.0"),
        ("rank collapse", {"features/rank": lambda step: 1 + 11 / step}, "features/rank"),
        # from the first step on, and also while the entropy looks normal
        ("rank collapse", {"features/rank": 4.0}, "features/rank is 4.0"),
        ("healthy", {"features/rank": 6.0}, ""),
        # from LayerScale 1e-5, features form one dimension after the other
        ("healthy", {"features/rank": lambda step: 1 + (step / 50) ** 2}, ""),
        ("healthy", {"features/rank": 4.0, "features/std": 0.2}, ""),
        ("healthy", {"features/std": lambda step: 0.02 + (step / 180) ** 4, "features/rank": 1.0}, ""),
        # the features of a new network may be equal, and so are their assignments
        ("healthy", {"features/rank": 1.0, "features/std": 0.01, "teacher/entropy": UNIFORM}, ""),
        ("learning rate", {"features/rank": lambda step: 12.0 if step in (1, 100) else 6.0}, "fell to 50%"),
        ("learning rate", {"optim/gradient_norm": lambda step: 80.0 if step == 90 else 2.0}, "40 times"),
        # large gradients at the start are normal
        ("healthy", {"optim/gradient_norm": lambda step: 80.0 if step < 9 else 2.0}, ""),
        ("schedule",
         {"loss/patch": lambda step: 2 + step / 1000, "teacher/temperature": lambda step: 0.003 + step / 1e4},
         "no fault"),
        ("healthy", {"loss/patch": lambda step: 2 - step / 1000, "teacher/temperature": lambda step: step / 1e4}, ""),
    ],
)  # fmt: skip
def test_each_verdict_follows_from_its_metrics(expected: str, changed: dict[str, Any], words: str) -> None:
    finding = verdict(changed)
    assert finding.verdict == expected and words in finding.text
    assert finding.kind == ("good" if expected in ("healthy", "schedule") else "bad")


def test_a_short_run_is_too_early_unless_its_images_are_wrong() -> None:
    finding = verdict({"teacher/entropy": UNIFORM}, steps=25)
    assert (finding.verdict, finding.kind) == ("too early", "open") and "monitor.collapse.every" in finding.text
    assert verdict({"data/pixel_std": 60.0}, steps=5).verdict == "inputs"


def test_metrics_of_earlier_versions_and_without_a_configuration_are_judged() -> None:
    assert judge_health([{"step": 3, "loss/total": None}], None).verdict == "too early"
    records = [{"step": step, "features/std": 0.8, "features/rank": 9.0, "data/pixel_std": None} for step in range(9)]
    assert judge_health(records, None).verdict == "healthy"
