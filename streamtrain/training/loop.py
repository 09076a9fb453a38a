"""The training loop."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from shards.format.files import write_whole
from shards.reading.mixture import AnySet
from streamtrain.checkpoint.writer import CheckpointWriter
from streamtrain.config.load import to_yaml
from streamtrain.config.tree import Config
from streamtrain.data.loader import Loader
from streamtrain.data.stream import check_state
from streamtrain.diagnostics.hang_detector import HangDetector
from streamtrain.diagnostics.non_finite import NonFiniteSteps
from streamtrain.engine.runtime import Launch, Runtime, init_process_group
from streamtrain.errors import CheckpointError
from streamtrain.ops.cpu.build import is_enabled
from streamtrain.planning.images import stored_images
from streamtrain.planning.memory import Plan
from streamtrain.planning.plan_text import end_summary, model_table, start_summary, table
from streamtrain.planning.units import duration
from streamtrain.reporting.panel import batch_panel
from streamtrain.reporting.sink import MetricsSink
from streamtrain.reporting.usage import peak_bytes
from streamtrain.run.directory import TRACEBACKS_NAME, log_start_notes, saved_state
from streamtrain.run.lock import MOVED, moved_error
from streamtrain.run.logs import keep_tracebacks
from streamtrain.run.messages import completed_text, labelled_set
from streamtrain.run.resume_policy import check_resume
from streamtrain.run.signals import EXIT_DRIFTED, SAVE, Requests
from streamtrain.training.build import Networks, StartState, build_loader, restore
from streamtrain.training.checkpoints import CheckpointPolicy
from streamtrain.training.health import describe_health
from streamtrain.training.observers import build_observers
from streamtrain.training.start_checks import plan_of_start, start_facts
from streamtrain.training.start_quality import StartQuality
from streamtrain.training.step import train_step

logger = logging.getLogger(__name__)


def train(
    config: Config,
    launch: Launch,
    shard_set: AnySet,
    resume_from: Path | None = None,
    accepted: Collection[str] = (),
    has_moved: Callable[[], bool] = lambda: False,
) -> int:
    """Train to ``run.steps``; resume from the run directory's latest checkpoint if there is one.

    Args:
        config: of the run, whose directory exists.
        shard_set: the images of ``data.shards``.
        resume_from: another run's directory to start from if this run is new.
        accepted: keys of settings that may differ from the checkpoint's.
        has_moved: returns on rank 0 whether the run directory was moved or replaced, after which nothing is written.

    Returns:
        The exit code: 0 if the run is complete, 75 or 130 if it was stopped early, 3 by ``evaluation.stop_if_below``.

    Raises:
        ShardError, StreamtrainError: for errors that the user can fix.
    """
    run_dir, exit_code, began, step_seconds = Path(config.run.dir), 0, time.monotonic(), 0.0
    keep_tracebacks(run_dir / TRACEBACKS_NAME)
    with init_process_group(config.engine, launch, start_facts(config, shard_set, launch)) as runtime:
        planned = _plan(config, runtime, shard_set)
        networks = Networks.build(config, runtime)
        _check_directory(run_dir, has_moved())
        start = restore(
            config, resume_from, networks.student, networks.teacher, networks.target_maker, networks.gram,
            networks.anchor,
        )  # fmt: skip
        loader = build_loader(config, runtime, shard_set, start)
        _check_start(config, runtime, start, loader, accepted)
        _check_directory(run_dir, has_moved())
        sink = _open_sink(config, runtime, start, planned)
        hang_detector = HangDetector(run_dir, runtime.rank, config.engine.hang_timeout_seconds)
        non_finite = NonFiniteSteps(run_dir, config.run.max_bad_steps, start.step, start.skipped_steps)
        observers = build_observers(
            config, runtime, shard_set, planned, networks, loader, sink, non_finite, hang_detector.wrap, start
        )
        writer = CheckpointWriter(
            run_dir, config.run, launch.local_world_size, config.engine.collective_timeout_seconds, has_moved
        )
        # before this, a stop request ends the process at once, because there is nothing to save
        requests = Requests(run_dir, launch.rank)
        policy = CheckpointPolicy(config, runtime, networks, loader, writer, sink, non_finite, requests)
        quality = StartQuality(config, runtime)
        step = start.step
        with hang_detector, closing(loader), closing(sink), closing(observers), closing(writer):
            while step < config.run.steps and not exit_code:
                step += 1
                result = train_step(
                    step, config, runtime, networks, loader, wrap=hang_detector.wrap,
                    before_update=writer.wait_until_copied,
                    stop_request=lambda: MOVED if has_moved() else requests.stop_code(),
                )  # fmt: skip
                requests.mark_step_completed()
                _check_directory(run_dir, result.stop_request == MOVED)
                non_finite.count(step, result.applied)
                metrics = result.metrics() | loader.scalars() | writer.scalars() | observers.after_step(result)
                step_seconds += metrics.get("speed/step_seconds", 0.0)
                sink.log(step, result.next_slot, metrics)
                result = replace(result, stop_request=max(result.stop_request, quality.stop_code(metrics)))
                policy.after_step(result, metrics)
                # a request to save does not stop the run
                exit_code = result.stop_request if result.stop_request > SAVE else 0
                if not exit_code:
                    non_finite.raise_if_diverged(step)
                next_slot = result.next_slot
                # free the batches before the next step
                del result
            policy.wait(step)
            if step == config.run.steps and step > start.step and not exit_code:
                policy.retry(step, next_slot)
        if exit_code == EXIT_DRIFTED:
            logger.error(quality.message(step, writer.status_message()))
        elif exit_code:
            requests.remove_stop_file()
            logger.info("stopped at step %d, %s; run the same command again to resume", step, writer.status_message())
        elif writer.failure:
            status = writer.status_message()
            raise CheckpointError(f"all steps are complete, but {status}; fix that and run the same command again")
        else:
            logger.info(end_summary(planned, peak_bytes(runtime.device)))
            times = duration(step_seconds), duration(time.monotonic() - began)
            labelled = labelled_set(config, shard_set)
            health = describe_health(run_dir, config) if runtime.rank == 0 else None
            logger.info(completed_text(config, step - start.step, *times, labelled, quality.drift, health))
    return exit_code


def _check_directory(run_dir: Path, has_moved: bool) -> None:
    """Raise StreamtrainError if the run directory has moved."""
    if has_moved:
        raise moved_error(run_dir)


def _plan(config: Config, runtime: Runtime, shard_set: AnySet) -> Plan:
    """Plan the memory; log it with derived settings and warnings."""
    if runtime.rank == 0:
        log_start_notes(config, runtime.world_size)
    on_gpu, bf16 = runtime.on_gpu, runtime.dtype == torch.bfloat16
    kernels = not on_gpu and is_enabled(runtime.dtype)
    images = stored_images(shard_set, config.crops.window)
    planned = plan_of_start(config, runtime.launch, on_gpu=on_gpu, bf16=bf16, kernels=kernels, images=images)
    logger.info(start_summary(planned))
    return planned


def _check_start(
    config: Config, runtime: Runtime, start: StartState, loader: Loader, accepted: Collection[str]
) -> None:
    """Check the configuration and the images against the restored checkpoint.

    The check before the process group started used the newest checkpoint, which may be damaged, and did not know the
    dtype, which depends on the machine.

    Raises:
        CheckpointError: if they differ in a way that is not accepted.
    """
    if start.source is not None and (saved := saved_state(start.source)) is not None:
        check_resume(config, start.source, saved, runtime.world_size, accepted, runtime.description["dtype"])
    if start.data:
        check_state(start.data, loader.state_dict(start.slot), accepted)


def _open_sink(config: Config, runtime: Runtime, start: StartState, planned: Plan) -> MetricsSink:
    """Open the run's metrics sink, now that all checks have passed, and show the configuration there."""
    run_dir = Path(config.run.dir)
    if start.source is not None:
        logger.info("resuming at step %d from %s", start.step, start.source)
    sink = MetricsSink(run_dir, config, rank=runtime.rank, start_step=start.step)
    sink.text("run/config", f"```yaml\n{to_yaml(config)}```")
    sink.text("run/plan", f"```\n{table(planned, runtime.world_size)}\n```")
    sink.text("run/model", f"```\n{model_table(config)}\n```")
    return sink


def dry_run(config: Config, shard_set: AnySet) -> int:
    """Draw one panel of crops into the run directory; one rank calls this."""
    picture = Path(config.run.dir) / "dry_run.png"
    end_slot = config.data.micro_batch
    with closing(Loader(shard_set, config, rank=0, world_size=1, device="cpu", end_slot=end_slot)) as loader:
        content = io.BytesIO()
        Image.fromarray(batch_panel(next(loader), config)).save(content, "png")
    write_whole(picture, content.getvalue())
    logger.info("%d samples in %s; crops drawn in %s", shard_set.num_samples, config.data.shards_text, picture)
    return 0
