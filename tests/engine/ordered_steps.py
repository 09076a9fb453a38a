"""A rank that takes training steps on the streams of ``streams`` and saves each; rank 0 prints JSON.

``ordered_steps.py DTYPE FORM [MUTANT...]``: with the settings of a GPU (prefetch), a Gram teacher that every step
refreshes, and checkpoints written in the background. With FORM=host, moments, EMA and activation checkpoints are in
host memory; with FORM=overlap, which the product does not use, gathers start on another stream. Values read by the host
are ignored as an order, because they hide races. Three steps as the product takes them, and a checkpoint, are followed
by steps and a snapshot for each MUTANT, which lacks a wait or has one more.
"""

from __future__ import annotations

import json
import math
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed
import streams
import torch
import torch._dynamo
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from gpu_settings import gpu_engine_config
from sharded_step import ACCUMULATION, batch_of, config_of

from streamtrain.checkpoint import writer as writer_module
from streamtrain.checkpoint.writer import CheckpointWriter
from streamtrain.config.load import build, merge
from streamtrain.config.tree import Config
from streamtrain.engine import moments as moments_module
from streamtrain.engine import teacher as teacher_module
from streamtrain.engine import zero
from streamtrain.engine.moments import moments_maker as make_moments
from streamtrain.engine.runtime import Launch, Runtime, init_process_group
from streamtrain.engine.teacher import Teacher
from streamtrain.ops.host_memory import staged_chunks
from streamtrain.planning.shapes import block_shapes
from streamtrain.run.directory import CHECKPOINTS, SNAPSHOTS
from streamtrain.training import build as build_module
from streamtrain.training.build import Networks, restore
from streamtrain.training.checkpoints import build_payloads
from streamtrain.training.step import StepResult, train_step

# a wait for a checkpoint would also order two steps, so only one of them is saved; DeepSpeed's timer waits from the
# third step on
STEPS, SAVED_STEP = 3, 2
HOST = {"engine": {"moments": "host", "offload_checkpoints": True}, "teacher": {"average": "host"}}
GRAM = {"gram": {"weight": 1.0, "refresh": {"first": 0, "every": 1}}}
WAITS = ("wait", "wait_until_copied")
# several chunks of each flat tensor
HOST_CHUNK = 2**11
# modules that ask whether a tensor is on a GPU before they use streams or host memory
ASKING = ("teacher.py", "host_memory.py")


@dataclass(frozen=True)
class Run:
    """A run on recorded streams."""

    config: Config
    runtime: Runtime
    networks: Networks
    writer: CheckpointWriter
    checked: streams.Streams

    def step(self, number: int) -> StepResult:
        loader = iter([batch_of(self.config, number, self.runtime.rank, micro) for micro in range(ACCUMULATION)])
        return train_step(
            number, self.config, self.runtime, self.networks, loader,
            wrap=lambda items: items, before_update=self.writer.wait_until_copied, stop_request=lambda: 0,
        )  # fmt: skip

    def save(self, step: int, kind: str = CHECKPOINTS) -> None:
        self.writer.save(step, build_payloads([kind], {"data": {}}, self.networks))

    def take_faults(self) -> dict[str, int]:
        """Return the faults since the last call."""
        self.writer.wait()
        faults = dict(self.checked.faults)
        # earlier accesses are not to conflict with later ones
        self.checked.synchronize()
        self.checked.faults.clear()
        return faults


def main(dtype: str, form: str, *mutants: str) -> None:
    launch = Launch.from_environment()
    config, checked = config_for(dtype, form, launch.world_size), streams.Streams(ordered_by_reads=False)
    with (
        init_process_group(config.engine, launch) as runtime,
        TemporaryDirectory() as folder,
        checked.installed(type(get_accelerator())),
        on_paths_of_a_gpu(checked, overlap=form == "overlap"),
    ):
        networks = Networks.build(config, runtime)
        restore(config, None, networks.student, networks.teacher, networks.target_maker, networks.gram)
        run = Run(config, runtime, networks, CheckpointWriter(Path(folder), config.run), checked)
        losses, waits = [], []
        checked.watched_file = "partition_parameters.py"
        for number in range(1, STEPS + 1):
            checked.host_waits.clear()
            losses.append(run.step(number).mean_losses["total"])
            waits.append(dict(checked.host_waits))
            if number == SAVED_STEP:
                run.save(number)
        found = {
            "faults": run.take_faults(), "losses": losses, "waits": waits, "faults_of": {}, "waits_of": {},
            "late_bytes": checked.late_bytes, "gathered_blocks": checked.watched_peak / block_bytes(config, runtime),
            "live_blocks": config.engine.live_blocks,
        }  # fmt: skip
        for number, mutant in enumerate(mutants, STEPS + 1):
            with MUTANTS[mutant](run):
                checked.host_waits.clear()
                # the second step gathers the shards that the first has written
                run.step(number)
                run.step(number)
                # only the teacher: to copy the student first would be a wait
                run.save(number, SNAPSHOTS)
            found["waits_of"][mutant] = dict(checked.host_waits)
            found["faults_of"][mutant] = run.take_faults()
        run.writer.close()
        if runtime.rank == 0:
            print(json.dumps(found), flush=True)


def config_for(dtype: str, form: str, world_size: int) -> Config:
    small = config_of(dtype, "block", "1", "off", "off").model_dump()
    batch = small["data"]["micro_batch"] * ACCUMULATION * world_size
    settings = {"data": {"global_batch": batch}, "run": {"steps": 100}, "objective": GRAM}
    return build(merge(merge(small, settings), HOST if form == "host" else {}))


def block_bytes(config: Config, runtime: Runtime) -> int:
    return sum(map(math.prod, block_shapes(config.model).values())) * runtime.dtype.itemsize


@contextmanager
def on_paths_of_a_gpu(checked: streams.Streams, overlap: bool) -> Iterator[None]:
    """Let the product treat CPU tensors like GPU tensors."""
    run_jobs = CheckpointWriter._run_jobs

    def engine_config(*arguments: Any) -> dict[str, Any]:
        settings = gpu_engine_config(*arguments)
        settings["zero_optimization"]["overlap_comm"] |= overlap
        return settings

    def moments_maker(engine: Any, folder: Path, device: torch.device) -> Any:
        return make_moments(engine, folder, torch.device("cuda") if engine.moments == "host" else device)

    def staged_ema(home: list[torch.Tensor], device: torch.device, chunk: int) -> Any:
        return staged_chunks(home, torch.device("cuda") if checked.is_host(home[0]) else device, chunk)

    def run_recorded_jobs(writer: CheckpointWriter) -> None:
        with checked.recording(of_host=True):
            run_jobs(writer)

    def then_ordered(wait: Callable[[CheckpointWriter], None]) -> Callable[[CheckpointWriter], None]:
        def waiting(writer: CheckpointWriter) -> None:
            wait(writer)
            checked.wait_for_thread()

        return waiting

    def is_cuda(tensor: torch.Tensor) -> bool:
        return sys._getframe(1).f_code.co_filename.endswith(ASKING) and not checked.is_host(tensor)

    with ExitStack() as stack:
        for owner, name, value in (
            (build_module, "engine_config", engine_config), (zero, "moments_maker", moments_maker),
            (CheckpointWriter, "_run_jobs", run_recorded_jobs), (torch.Tensor, "is_cuda", property(is_cuda)),
            *((CheckpointWriter, name, then_ordered(getattr(CheckpointWriter, name))) for name in WAITS),
            (torch.cuda, "is_initialized", lambda: True), (torch.cuda, "set_device", lambda device: None),
            (moments_module, "HOST_CHUNK", HOST_CHUNK), (teacher_module, "HOST_CHUNK", HOST_CHUNK),
            (teacher_module, "staged_chunks", staged_ema),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


Mutant = Callable[[Run], AbstractContextManager[Any]]


def without_order_in(file: str) -> Mutant:
    """Return a mutant in which the current stream does not wait for the collectives of a module."""

    def mutant(run: Run) -> AbstractContextManager[Any]:
        wait = dist.Work.wait

        def wait_elsewhere(work: dist.Work, *arguments: Any, **more: Any) -> Any:
            on = run.checked.on(run.checked.stream()) if streams._is_within(file) else nullcontext()
            with on:
                return wait(work, *arguments, **more)

        return mock.patch.object(dist.Work, "wait", wait_elsewhere)

    return mutant


def without_waits_in(file: str, function: str, kind: str) -> Mutant:
    """Return a mutant in which a function's waits of a stream, for another stream or for an event, do nothing."""
    method = getattr(streams._Stream, kind)

    def wait(stream: streams._Stream, awaited: Any) -> None:
        code = sys._getframe(1).f_code
        if not (code.co_filename.endswith(file) and code.co_name == function):
            method(stream, awaited)

    return lambda run: mock.patch.object(streams._Stream, kind, wait)


def without(owner: type, name: str) -> Mutant:
    """Return a mutant in which a method that waits does nothing."""
    return lambda run: mock.patch.object(owner, name, lambda self: None)


@contextmanager
def update_before_the_copy(run: Run) -> Iterator[None]:
    """Save a checkpoint whose values the next step updates before they are copied."""
    copy, update, is_updated = writer_module._copy, Teacher.update, threading.Event()

    def copy_late(payloads: Any) -> Any:
        assert is_updated.wait(60)
        return copy(payloads)

    def update_first(teacher: Teacher, momentum: float) -> None:
        update(teacher, momentum)
        is_updated.set()

    with (
        mock.patch.object(writer_module, "_copy", copy_late),
        mock.patch.object(Teacher, "update", update_first),
        mock.patch.object(CheckpointWriter, "wait_until_copied", lambda writer: None),
    ):
        run.save(0)
        yield


def time_throughput(run: Run) -> AbstractContextManager[Any]:
    """Let DeepSpeed measure its throughput, as its default settings do from the third step on."""
    timer = run.networks.student._engine.tput_timer
    timer.start_step = 0
    return mock.patch.object(timer.config, "enabled", True)


def gather_through_deepspeed(run: Run) -> AbstractContextManager[Any]:
    """Gather the prototypes with DeepSpeed's function."""

    @contextmanager
    def gathered(weight: zero.ShardedWeight) -> Iterator[torch.Tensor]:
        with deepspeed.zero.GatheredParameters([weight._parameter]):
            yield weight._parameter.detach()

    return mock.patch.object(zero.ShardedWeight, "gathered", gathered)


@contextmanager
def wait_for_reductions(run: Run) -> Iterator[None]:
    """Let the host wait for the reductions of each micro-batch, as DeepSpeed does."""
    stream = run.networks.student._stage3._stage3.reduce_and_partition_stream
    ignored = stream.__dict__.pop("synchronize")
    yield
    stream.synchronize = ignored


def wait_for_gathers(run: Run) -> AbstractContextManager[Any]:
    """Let the host wait for earlier gathers, as DeepSpeed does to limit memory."""
    coordinator = run.networks.student._stage3._stage3.parameter_offload.get_param_coordinator()
    name = "_PartitionedParameterCoordinator__ongoing_fetch_events"
    return mock.patch.object(coordinator, name, deque())


MUTANTS: dict[str, Mutant] = {
    "gathers": without_order_in("partition_parameters.py"),
    "reductions": without_order_in("gradients.py"),
    "stream of the writer": without_waits_in("writer.py", "_side_stream", "wait_stream"),
    "copy of the writer": update_before_the_copy,
    "EMA on the host": without(Teacher, "_wait_for_copies"),
    **{
        f"{function} {kind}": without_waits_in("host_memory.py", function, kind)
        for function, kind in (
            ("staged_chunks", "wait_event"),
            ("staged_chunks", "wait_stream"),
            ("load", "wait_event"),
            ("_pack", "wait_stream"),
            ("_unpack", "wait_event"),
            ("_load", "wait_stream"),
            ("_wait_for_copies", "wait_event"),
        )
    },
    "throughput timer": time_throughput,
    "DeepSpeed's gather": gather_through_deepspeed,
    "wait for reductions": wait_for_reductions,
    "wait for gathers": wait_for_gathers,
}


if __name__ == "__main__":
    main(*sys.argv[1:])
