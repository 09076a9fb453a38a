"""What a run says of itself before its first step."""

from __future__ import annotations

import pytest

from streamtrain.config.load import build
from streamtrain.errors import ConfigError
from streamtrain.run_folder import start_notes


def test_the_batch_is_shown_and_a_small_koleo_group_is_warned_of() -> None:
    alone = build({"data": {"micro_batch": 2, "global_batch": 16}})
    first, warning = start_notes(alone, 4)
    assert first == "batch 16 = 2 x 4 rank(s) x 2 micro-batch(es)"
    assert warning.startswith("warning: KoLeo") and "2 sample(s)" in warning
    together = build({"data": {"micro_batch": 2}, "objective": {"koleo": {"distributed": True}}})
    assert len(start_notes(together, 4)) == 1 and len(start_notes(together, 2)) == 2
    assert len(start_notes(build({"data": {"micro_batch": 1}, "objective": {"koleo": {"weight": 0}}}), 1)) == 1


def test_a_scaled_learning_rate_is_shown() -> None:
    keys = {"data": {"micro_batch": 16, "global_batch": 256}, "schedules": {"lr": 1e-3}}
    sqrt = build({**keys, "optim": {"lr_scaling": "sqrt", "lr_reference_batch": 1024}})
    linear = build({**keys, "optim": {"lr_scaling": "linear", "lr_reference_batch": 1024}})
    assert sqrt.optim.lr_factor(256) == 0.5 and linear.optim.lr_factor(256) == 0.25 == linear.optim.lr_factor(256)
    assert start_notes(sqrt, 2)[1] == "lr peak 0.0005 = 0.001 x 0.5 (sqrt of batch 256 / 1024)"
    for half in ({"lr_scaling": "sqrt"}, {"lr_reference_batch": 64}, {"clip_per": "module", "clip": 0}):
        with pytest.raises(ConfigError):
            build({"optim": half})
