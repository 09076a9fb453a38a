"""A rank that takes training steps on the streams of ``streams``; rank 0 prints JSON.

``ordered_steps.py DTYPE [MUTANT]``: with the settings of a GPU (prefetch), and reads by the host ignored as an order,
because they hide races. MUTANT takes away one wait, for gathers or for reductions, or gathers on another stream.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import streams
import torch._dynamo  # noqa: F401 - it inspects functions that the streams replace
from deepspeed.accelerator import get_accelerator
from sharded_step import ACCUMULATION, batch_of, config_of

from streamtrain.config.load import build, merge
from streamtrain.engine.runtime import Launch, init_process_group
from streamtrain.training import build as build_module
from streamtrain.training.build import Networks, restore
from streamtrain.training.step import train_step

STEPS = 2


def main(dtype: str, mutant: str = "") -> None:
    launch = Launch.from_environment()
    small = config_of(dtype, "block", "1", "off", "off").model_dump()
    batch = small["data"]["micro_batch"] * ACCUMULATION * launch.world_size
    config = build(merge(small, {"data": {"global_batch": batch}, "run": {"steps": STEPS}}))
    checked = streams.Streams(ordered_by_reads=False)
    settings = build_module.engine_config

    def of_a_gpu(*arguments: Any) -> dict[str, Any]:
        found = settings(*arguments)
        overlap = mutant == "gathers on another stream"
        found["zero_optimization"] |= {"overlap_comm": overlap, "stage3_prefetch_bucket_size": arguments[-1]}
        block_bytes.append(arguments[-1] * (2 if dtype == "bf16" else 4))
        return found

    block_bytes: list[int] = []
    remove_wait(mutant)
    build_module.engine_config = of_a_gpu
    with init_process_group(config.engine, launch) as runtime, checked.installed(type(get_accelerator())):
        networks = Networks.build(config, runtime)
        restore(config, None, networks.student, networks.teacher, networks.target_maker)
        losses, waits = [], []
        checked.watched_file = "partition_parameters.py"
        for step in range(1, STEPS + 1):
            loader = iter([batch_of(config, step, runtime.rank, micro) for micro in range(ACCUMULATION)])
            checked.host_waits.clear()
            result = train_step(
                step, config, runtime, networks, loader,
                wrap=lambda items: items, before_update=lambda: None, stop_request=lambda: 0,
            )  # fmt: skip
            waits.append(dict(checked.host_waits))
            losses.append(result.mean_losses["total"])
        if runtime.rank == 0:
            found = {
                "faults": checked.faults, "waits": waits, "losses": losses, "late_bytes": checked.late_bytes,
                "gathered_blocks": checked.watched_peak / block_bytes[0], "live_blocks": config.engine.live_blocks,
            }  # fmt: skip
            print(json.dumps(found), flush=True)


def remove_wait(mutant: str) -> None:
    """Take away one kind of wait: a collective is complete, but the current stream does not wait for it."""
    files = {"no wait for gathers": "partition_parameters.py", "no wait for reductions": "gradients.py"}
    if mutant not in files:
        return

    def waiting(self: streams.Streams, wait: Any) -> Any:
        waiting = original(self, wait)

        def wait_elsewhere(*arguments: Any, **more: Any) -> Any:
            if not streams._is_within(files[mutant]):
                return waiting(*arguments, **more)
            with self.on(self.stream()):
                return waiting(*arguments, **more)

        return wait_elsewhere

    original = streams.Streams._waiting
    streams.Streams._waiting = waiting  # type: ignore[method-assign]


if __name__ == "__main__":
    main(*sys.argv[1:])
