"""Time of the training step by kernel, as PyTorch's profiler records it."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.training_step import WARM_UP, PhaseTimer, StartTimer, run_in_ranks, run_steps
from streamtrain.config.tree import Config
from streamtrain.engine.runtime import Launch, choose_accelerator, init_process_group

# the kernels that take most time, and the length of their names
NUM_KERNELS, NAME_LENGTH = 40, 120


def run(config: Config, steps: int) -> dict[str, Any]:
    """Profile ``steps`` steps on one rank; without ``data.shards``, on a fixed batch of noise."""
    result = run_in_ranks(measure, config, steps, ranks=1)
    del result["rank"]
    return result


def measure(config: Config, steps: int) -> dict[str, Any]:
    """Profile the training step in this process."""
    launch = Launch.from_environment()
    choose_accelerator(config.engine, launch)
    with init_process_group(config.engine, launch) as runtime:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if runtime.on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        stepping = run_steps(config, runtime, PhaseTimer(runtime.on_gpu, is_enabled=False), StartTimer())
        for _ in range(WARM_UP):
            next(stepping)
        if runtime.on_gpu:
            torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            started = time.perf_counter()
            for _ in range(steps):
                next(stepping)
            if runtime.on_gpu:
                torch.cuda.synchronize()
            seconds = (time.perf_counter() - started) / steps
        stepping.close()
        return _summarise(profile, steps, seconds, runtime.on_gpu)


def _summarise(profile: torch.profiler.profile, steps: int, step_seconds: float, on_gpu: bool) -> dict[str, Any]:
    """Return the kernels by time: of a GPU its kernels and copies, of a CPU PyTorch's operations."""
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    rows = []
    for row in profile.key_averages():
        # ranges that a library has named enclose kernels
        if row.device_type != kind or getattr(row, "is_user_annotation", False):
            continue
        microseconds = row.self_device_time_total if on_gpu else row.self_cpu_time_total
        rows.append((microseconds / 1e6 / steps, row.count / steps, row.key[:NAME_LENGTH]))
    rows.sort(reverse=True)
    total = sum(seconds for seconds, _, _ in rows)
    return {
        "step_seconds": step_seconds,
        # kernels on several streams overlap, so this may exceed the step
        "kernel_seconds": total,
        "kernels": sum(calls for _, calls, _ in rows),
        "largest": [
            {"name": name, "seconds": seconds, "calls": calls, "share": seconds / total}
            for seconds, calls, name in rows[:NUM_KERNELS]
        ],
    }
