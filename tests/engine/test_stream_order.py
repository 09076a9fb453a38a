"""Training steps and checkpoints on recorded streams: no race on one or two ranks, and two waits of the host a step.

It runs on a CPU (``streams``); none of it has run on a GPU.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

SCRIPT = Path(__file__).with_name("ordered_steps.py")


def run_steps(ranks: int, *arguments: str) -> dict[str, Any]:
    done = run_ranks([SCRIPT, *arguments], ranks)
    assert all(status == 0 for status, _, _ in done), done[0][2][-3000:]
    found: dict[str, Any] = json.loads(done[0][1].splitlines()[-1])
    return found


def waits_of_steps(found: dict[str, int]) -> Counter[str]:
    """Return the waits of the host by kind and function, without the thread that writes checkpoints."""
    waits = Counter[str]()
    for wait, count in found.items():
        kind, _, position = wait.partition(" at ")
        if not position.startswith("writer.py"):
            waits[f"{kind} {position.rpartition(' ')[2]}"] += count
    return waits


def check_steps(ranks: int, dtype: str, form: str) -> None:
    found = run_steps(ranks, dtype, form)
    assert not found["faults"], "\n".join(found["faults"])
    waits = waits_of_steps(found["waits"][-1])
    # of the Gram teacher's refresh
    refresh = {kind: waits.pop(kind, 0) for kind in ("device _wait_for_copies", "copy write")}
    assert all(bool(count) == (form == "host") for count in refresh.values())
    # whether the update is applied; then losses, gradient norms and stop requests. None is per micro-batch.
    assert waits == {"read is_invalid_grad_norm": 1, "read read_results": 1}
    # however far the host is ahead, gathers and reductions reuse memory
    assert found["late_bytes"] == 0
    assert found["gathered_blocks"] <= found["live_blocks"] + 1
    assert (found["gathered_blocks"] > 2) == (ranks > 1)


@pytest.mark.parametrize("form", ["device", pytest.param("host", marks=pytest.mark.slow)])
def test_steps_have_no_race_two_host_waits_and_bounded_memory(form: str) -> None:
    check_steps(2, "bf16", form)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["device", "host"])
@pytest.mark.parametrize(("ranks", "dtype"), [(1, "bf16"), (2, "fp32"), (1, "fp32")])
def test_steps_of_other_dtypes_and_ranks_have_no_race(ranks: int, dtype: str, form: str) -> None:
    check_steps(ranks, dtype, form)


@pytest.mark.slow
def test_gathers_on_another_stream_race_with_writes_and_hold_memory() -> None:
    found = run_steps(2, "bf16", "overlap")
    # of the student and the teacher at the start, the teacher in a step, and the Gram teacher
    for write in ("write < build.py", "update < teacher.py", "update < step.py", "write < gram.py"):
        assert any(write in fault for fault in found["faults"]), write
    assert found["late_bytes"] > 0


# form of a run, and part of the fault that it has without one wait
FAULTS = [
    (
        "device",
        {
            "gathers": "read by cat",
            "reductions": "gradients.py",
            # the thread copies values that a step is changing
            "stream of the writer": "after the write by lerp_",
            "copy of the writer": "after the write by _fused_adamw_",
        },
    ),
    (
        "host",
        {
            "EMA on the host": "read by copy_ on the host",
            # moments and EMA: a chunk is changed before it is loaded, stored before it is changed, and overwritten
            "staged_chunks wait_event": "write by _fused_adamw_ on stream 0",
            "staged_chunks wait_stream": "after the write by _fused_adamw_",
            "load wait_event": "after the read by copy_",
        },
    ),
    (
        "host",
        {
            # activations: kept before they are computed, used before they are loaded, loaded into memory in use, and
            # freed before they are kept
            "_pack wait_stream": "_pack < vit.py",
            "_unpack wait_event": "after the write by copy_",
            "_load wait_stream": "after the write by empty",
            "_wait_for_copies wait_event": "freed by stream 0 before the end of the read by copy_",
        },
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "faults"), FAULTS, ids=["device", "states", "activations"])
def test_a_missing_wait_is_found(form: str, faults: dict[str, str]) -> None:
    found = run_steps(2, "bf16", form, *faults)["faults_of"]
    for mutant, part in faults.items():
        assert any(part in fault for fault in found[mutant]), (mutant, found[mutant])


# waits of the host that DeepSpeed would have, in two steps of two micro-batches
WAITS = {
    "throughput timer": {"device start", "device stop"},
    "DeepSpeed's gather": {"device _allgather_params_sequential"},
    "wait for reductions": {"stream independent_gradient_partition_epilogue"},
    "wait for gathers": {"event _fetch_sub_module_impl"},
}


@pytest.mark.slow
def test_a_wait_of_the_host_is_counted() -> None:
    found = run_steps(2, "bf16", "device", *WAITS)["waits_of"]
    for mutant, expected in WAITS.items():
        waits = waits_of_steps(found[mutant])
        # one or more a micro-batch
        assert all(waits[kind] >= 4 for kind in expected), (mutant, waits)
