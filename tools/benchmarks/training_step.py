"""Throughput, memory and phase shares of the whole training step, alone and against a plain PyTorch step."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from benchmarks.collective_traffic import Traffic
from benchmarks.plain_step import PlainStep
from benchmarks.process_usage import call_with_portable_errors, process_age_seconds
from streamtrain.config.load import open_shard_set
from streamtrain.config.masks import max_rows
from streamtrain.config.section import ImageSize
from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch
from streamtrain.data.loader import Loader
from streamtrain.data.masking import draw_masks, rasterise
from streamtrain.engine.runtime import Launch, Runtime, choose_accelerator, init_process_group, uses_bf16
from streamtrain.planning.flops import step_flops
from streamtrain.planning.memory import plan
from streamtrain.planning.peak import peak_flops
from streamtrain.reporting.usage import peak_rss_bytes

WARM_UP = 2
HEADS = ("global_head", "patch_head")
PHASES = ("data_wait", "teacher", "targets", "forward", "backward", "optimiser", "average")


@dataclass
class PhaseTimer:
    """Seconds of each step's phases; on a GPU, each phase ends with a device sync, so phases do not overlap."""

    on_gpu: bool
    is_enabled: bool = True
    seconds: list[dict[str, float]] = field(default_factory=list)
    _last: float = 0.0

    def begin(self) -> None:
        """Start a step."""
        if self.is_enabled:
            self.seconds.append(dict.fromkeys(PHASES, 0.0))
            self._last = self._now()

    def end(self, phase: str) -> None:
        """Add the time since the last call to ``phase``."""
        if not self.is_enabled:
            return
        now = self._now()
        self.seconds[-1][phase] += now - self._last
        self._last = now

    def _now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


class StepTimer:
    """Seconds of each step; on a GPU by events of its stream, without a device sync between the steps."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._times: list[Any] = []

    def mark(self) -> None:
        """End a step, and begin the next one."""
        if not self._on_gpu:
            self._times.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._times.append(event)

    def seconds(self) -> list[float]:
        """Return the time between each two marks."""
        pairs = zip(self._times, self._times[1:], strict=False)
        if not self._on_gpu:
            return [end - start for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


class StartTimer:
    """Seconds of the parts of the start-up, since the start of this process."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def end(self, part: str) -> None:
        """Record the time since the previous part as ``part``; later calls with the same part are ignored."""
        self.seconds.setdefault(f"start_{part}_seconds", process_age_seconds() - sum(self.seconds.values()))


def run(config: Config, steps: int, ranks: int, compare: bool) -> dict[str, Any]:
    """Measure ``steps`` steps; without ``data.shards``, on a fixed batch of noise.

    ``ratio`` is the throughput divided by the plain step's, ``peak_ratio`` the same for peak memory. The two are
    measured interleaved, each in new processes, so that other load on the machine affects both.
    """
    rounds = 2 if compare else 1
    own_runs, plain_runs = [], []
    for _ in range(rounds):
        own_runs.append(run_in_ranks(measure, config, -(-steps // rounds), ranks=ranks))
        if compare:
            plain_runs.append(run_in_ranks(measure_plain, config, -(-steps // rounds), ranks=1))
    result = _merge(own_runs)
    images, _ = config.batch_split(ranks)
    flops = step_flops(config, ranks)
    result["images_per_second"] = images / result["step_seconds"]
    result["model_flops_per_image"] = flops.model / images
    result["mfu"] = flops.model / ranks / result["step_seconds"] / result["peak_flops"]
    result["executed_of_peak"] = flops.executed / ranks / result["step_seconds"] / result["peak_flops"]
    planned = plan(config, ranks, on_gpu=bool(result["peak_gpu_bytes"])).all_gather_bytes_per_step
    result["planned_all_gather_bytes"] = planned
    if compare:
        other = _merge(plain_runs)
        other["images_per_second"] = config.data.micro_batch / other["step_seconds"]
        result |= {f"plain_{key}": value for key, value in other.items()}
        result["ratio"] = result["images_per_second"] / other["images_per_second"]
        result["peak_ratio"] = result["peak_rss_bytes"] / other["peak_rss_bytes"]
    return result


def measure(config: Config, steps: int) -> dict[str, Any]:
    """Measure the training step in this process, one of the ranks that the environment describes."""
    start = StartTimer()
    launch = Launch.from_environment()
    choose_accelerator(config.engine, launch)
    import streamtrain.training.build  # noqa: F401  (includes DeepSpeed)

    start.end("imports")
    traffic = Traffic()
    with init_process_group(config.engine, launch) as runtime:
        start.end("process_group")
        # a device sync after each phase slows a step on a GPU, so there the phases are measured in steps of their own
        phases = PhaseTimer(runtime.on_gpu, is_enabled=not runtime.on_gpu)
        timer = StepTimer(runtime.on_gpu)
        stepping = run_steps(config, runtime, phases, start)
        for _ in range(WARM_UP):
            next(stepping)
            if runtime.on_gpu:
                torch.cuda.synchronize()
            start.end("first_step")
        phases.seconds.clear()
        traffic.reset()
        timer.mark()
        for _ in range(steps):
            next(stepping)
            timer.mark()
        step_seconds = timer.seconds()
        gathered_bytes, communication_seconds = traffic.gathered_bytes // steps, traffic.seconds
        if runtime.on_gpu:
            phases.is_enabled = True
            for _ in range(steps):
                next(stepping)
        stepping.close()
        return _collect_result(step_seconds, phases, runtime) | {
            **start.seconds,
            "start_to_first_step_seconds": sum(start.seconds.values()),
            "all_gather_bytes": gathered_bytes,
            "communication_share": communication_seconds / sum(step_seconds),
        }


def run_steps(
    config: Config, runtime: Runtime, phases: PhaseTimer, start: StartTimer
) -> Generator[None, None, None]:  # fmt: skip
    """Run one step each time, after the networks have been built."""
    from streamtrain.objective.targets import TargetMaker, TeacherPrototypes
    from streamtrain.training.build import build_networks, restore
    from streamtrain.training.ssl_model import LossWeights

    _, accumulation = config.batch_split(runtime.world_size)
    student, teacher = build_networks(config, runtime, accumulation)
    start.end("networks")
    maker = TargetMaker(config.objective)
    teacher_prototypes = TeacherPrototypes(*(teacher.weight(f"{head}.prototypes.weight") for head in HEADS))
    restore(config, None, student, teacher, maker)
    start.end("values")
    student.module.register_forward_hook(lambda *_: phases.end("forward"))
    weights = LossWeights()
    with _open_stream(config, runtime) as stream:
        while True:
            phases.begin()
            student.set_rates(1e-4, 0.04, last_layer_frozen=False)
            batches = [next(stream) for _ in range(accumulation)]
            phases.end("data_wait")
            start.end("loader")
            features = [teacher.teacher_features(batch, weights) for batch in batches]
            phases.end("teacher")
            targets = maker.make(features, teacher_prototypes, 0.07)
            phases.end("targets")
            for batch, target in zip(batches, targets, strict=True):
                student.accumulate(batch, target, weights)
                phases.end("backward")
                student.step()
                phases.end("optimiser")
            teacher.update(0.99)
            phases.end("average")
            yield


def measure_plain(config: Config, steps: int) -> dict[str, Any]:
    """Measure the plain step in this process, without the runtime's CPU settings."""
    launch = Launch.from_environment()
    cuda = choose_accelerator(config.engine, launch) == "cuda"
    if not cuda:
        torch.set_num_threads(config.engine.cpu_threads or launch.cores)
    bf16 = uses_bf16(config.engine, cuda)
    runtime = Runtime(launch, torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if bf16 else torch.float32)
    plain = PlainStep(config, runtime.device, autocast=bf16)
    step_seconds = []
    with _open_stream(config, runtime) as stream:
        for _ in range(WARM_UP + steps):
            started = time.perf_counter()
            plain(next(stream), 1e-4, 0.04, 0.99, 0.07)
            if cuda:
                torch.cuda.synchronize()
            step_seconds.append(time.perf_counter() - started)
    return _collect_result(step_seconds[WARM_UP:], None, runtime)


@contextmanager
def _open_stream(config: Config, runtime: Runtime) -> Iterator[Iterator[Batch]]:
    """Yield the stream of ``data.shards`` or, if that is empty, one batch of noise repeated."""
    if not config.data.shards:
        noise = make_noise_batch(config, runtime.device)
        yield iter(lambda: noise, None)
        return
    loader = Loader(
        open_shard_set(config), config, rank=runtime.rank, world_size=runtime.world_size, device=runtime.device,
        cores=runtime.launch.cores,
    )  # fmt: skip
    with closing(loader):
        yield loader


def make_noise_batch(config: Config, device: torch.device) -> Batch:
    """Return a micro-batch of noise with the masks of the first slots."""
    crops, size = config.crops, config.data.micro_batch
    draw = np.random.default_rng(0)

    def noise(count: int, shape: ImageSize) -> torch.Tensor:
        return torch.from_numpy(draw.integers(0, 256, (count * size, *shape, 3), dtype=np.uint8)).to(device)

    slots = np.arange(size)
    grid = crops.global_size.grid(config.model.patch_size)
    parameters = draw_masks(config.masks, config.run.seed, slots, crops.global_count, grid)
    rows = max_rows(config.masks, size, crops.global_count, grid[0] * grid[1], config.masks.group)
    masks = rasterise(parameters, grid, rows, device)
    return Batch(slots, noise(crops.global_count, crops.global_size), noise(crops.local_count, crops.local_size), masks)


def run_in_ranks(work: Any, *arguments: object, ranks: int) -> dict[str, Any]:
    """Run ``work(*arguments)`` in new processes, the ranks of one group; return the result of rank 0.

    Raises:
        StreamtrainError: with the message of a ``ValueError`` in a rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(ranks, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_run_as_rank, rank, ranks, port, work, *arguments) for rank in range(ranks)]
        results: list[dict[str, Any]] = [future.result() for future in futures]
    return next(result for result in results if result["rank"] == 0)


def _run_as_rank(rank: int, ranks: int, port: int, work: Any, *arguments: object) -> dict[str, Any]:
    variables = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({key: str(value) for key, value in variables.items()})
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"rank": rank, **call_with_portable_errors(work, *arguments)}


def _collect_result(step_seconds: list[float], phases: PhaseTimer | None, runtime: Runtime) -> dict[str, Any]:
    measured = phases.seconds if phases else []
    return {
        "seconds": step_seconds,
        "phases": {phase: sum(each[phase] for each in measured) for phase in PHASES} if phases else {},
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if runtime.on_gpu else 0,
        "peak_flops": peak_device_flops(runtime),
    }


def peak_device_flops(runtime: Runtime) -> float:
    """Return the peak FLOP/s from the device's data sheet or, if unknown (a CPU), as measured by a large matmul."""
    if runtime.on_gpu:
        peak = peak_flops(torch.cuda.get_device_name(runtime.device), runtime.dtype == torch.bfloat16)
        if peak is not None:
            return peak
    size = 4096 if runtime.on_gpu else 2048
    left, right = (torch.randn(size, size, device=runtime.device).to(runtime.dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        float((left @ right)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def _merge(runs: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [each for one in runs for each in one["seconds"]]
    total = sum(sum(one["phases"].values()) for one in runs)
    merged = {
        "step_seconds": float(np.median(seconds)),
        "step_seconds_p90": float(np.quantile(seconds, 0.9)),
        **{f"{phase}_share": sum(one["phases"][phase] for one in runs) / total for phase in runs[0]["phases"]},
        **{key: max(one[key] for one in runs) for key in ("peak_rss_bytes", "peak_gpu_bytes", "peak_flops")},
    }
    for key in ("all_gather_bytes", "communication_share"):
        if key in runs[0]:
            merged[key] = min(one[key] for one in runs)
    # the parts of one run, so that they add up
    fastest = min(runs, key=lambda one: one.get("start_to_first_step_seconds", 0.0))
    return merged | {key: value for key, value in fastest.items() if key.startswith("start_")}
