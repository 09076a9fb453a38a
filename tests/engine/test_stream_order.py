"""Training steps on recorded streams: no race on one or two ranks, and few waits of the host.

It runs on a CPU (``streams``); none of it has run on a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

SCRIPT = Path(__file__).with_name("ordered_steps.py")


def steps_of(ranks: int, *arguments: str) -> dict[str, Any]:
    done = run_ranks([SCRIPT, *arguments], ranks, fresh=True)
    assert all(status == 0 for status, _, _ in done), done[0][2][-3000:]
    found: dict[str, Any] = json.loads(done[0][1].splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("ranks", "dtype"),
    [(2, "bf16"), *(pytest.param(*each, marks=pytest.mark.slow) for each in [(1, "bf16"), (2, "fp32"), (1, "fp32")])],
)
def test_steps_have_no_race_two_host_waits_and_bounded_memory(ranks: int, dtype: str) -> None:
    found = steps_of(ranks, dtype)
    assert not found["faults"], "\n".join(found["faults"])
    # whether the update is applied; then losses, gradient norms and stop requests. None is per micro-batch.
    waits = {place.partition(" at ")[0] + " " + place.rpartition(" ")[2]: n for place, n in found["waits"][-1].items()}
    assert waits == {"read is_invalid_grad_norm": 1, "read read_results": 1}
    # However far the host is ahead, gathers and reductions reuse memory. DeepSpeed's last prefetched parameter may
    # exceed the limit by a third of a block.
    assert found["late_bytes"] == 0
    assert found["gathered_blocks"] <= found["live_blocks"] + 1 + 1 / 3
    assert (found["gathered_blocks"] > 2) == (ranks > 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutant", "fault"), [("no wait for gathers", "read by cat"), ("no wait for reductions", "gradients.py")]
)
def test_a_missing_wait_is_found(mutant: str, fault: str) -> None:
    faults = steps_of(2, "bf16", mutant)["faults"]
    assert any(fault in each for each in faults), faults


@pytest.mark.slow
def test_gathers_on_another_stream_hold_memory() -> None:
    found = steps_of(2, "bf16", "gathers on another stream")
    # and the teacher's shards are gathered while they are written
    assert any(" update " in each for each in found["faults"])
    assert found["late_bytes"] > 0
