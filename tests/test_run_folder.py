"""What a run says of itself before its first step."""

from __future__ import annotations

from streamtrain.config.load import build
from streamtrain.run_folder import start_notes


def test_the_batch_is_shown_and_a_small_koleo_group_is_warned_of() -> None:
    alone = build({"data": {"micro_batch": 2, "global_batch": 16}})
    first, warning = start_notes(alone, 4)
    assert first == "batch 16 = 2 x 4 rank(s) x 2 micro-batch(es)"
    assert warning.startswith("warning: KoLeo") and "2 sample(s)" in warning
    together = build({"data": {"micro_batch": 2}, "objective": {"koleo": {"distributed": True}}})
    assert len(start_notes(together, 4)) == 1 and len(start_notes(together, 2)) == 2
    assert len(start_notes(build({"data": {"micro_batch": 1}, "objective": {"koleo": {"weight": 0}}}), 1)) == 1
