"""Observers of a run: diagnostics, speed, evaluation, pictures, histograms and traces; none affects training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.format.append_log import RETRY_SECONDS
from shards.reading.mixture import AnySet
from streamtrain.config.crops import CropSizes
from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch
from streamtrain.data.loader import Loader
from streamtrain.diagnostics.collapse import CollapseDetector
from streamtrain.diagnostics.inputs import measure_inputs
from streamtrain.diagnostics.non_finite import NonFiniteSteps
from streamtrain.diagnostics.spikes import SpikeDetector
from streamtrain.engine.runtime import Runtime
from streamtrain.engine.teacher import Teacher
from streamtrain.engine.zero import Student
from streamtrain.evaluation.features import decode_crop
from streamtrain.evaluation.held_out import HeldOut, first_images, held_out, reference_images, sample_images
from streamtrain.evaluation.maps import map_size
from streamtrain.evaluation.online import OnlineEvaluation, embed_maps
from streamtrain.evaluation.over_time import MapsOverTime
from streamtrain.ops.collectives import SharedFailure
from streamtrain.planning.flops import step_flops
from streamtrain.planning.memory import Plan
from streamtrain.planning.peak import peak_flops
from streamtrain.reporting.panel import batch_panel, shown_crops
from streamtrain.reporting.profiler import Profiler
from streamtrain.reporting.sink import BestEffort, MetricsSink
from streamtrain.reporting.usage import StepClock, Work, memory_scalars
from streamtrain.run.directory import describe_run
from streamtrain.run.provenance import PLANNED_PEAK
from streamtrain.training.build import Networks, StartState
from streamtrain.training.distill import frozen_teacher_config
from streamtrain.training.step import StepResult, Wrap, draws_panels, has_evaluation, is_due

MAPS_NAME = "maps.npz"
logger = logging.getLogger(__name__)


class Observer:
    """Observes completed steps, independently of other observers.

    If it communicates, it runs rank-local work that may fail through ``SharedFailure.run``: then it fails on all ranks,
    and no rank waits for another in a collective.
    """

    def start(self) -> None:
        """Prepare before the first step; may use collectives."""

    def after_step(self, result: StepResult) -> dict[str, float]:
        """Return metrics of a completed step by tag."""
        raise NotImplementedError

    def communicates(self, result: StepResult) -> bool:
        """Return whether ``after_step`` uses collectives; the same on all ranks."""
        return False

    def close(self) -> None:
        """Release resources at the end of the run."""


class ObserverList:
    """Calls observers in the same order on all ranks.

    An observer that raises is logged once, its metrics of that step are left out, and it is called again after the next
    step. If it communicates and fails on one rank, all ranks leave its metrics out.
    """

    def __init__(self, observers: Sequence[Observer], failure: SharedFailure) -> None:
        self._observers = [(observer, BestEffort(type(observer).__name__)) for observer in observers]
        self._failure = failure

    def start(self) -> None:
        """Prepare the observers; an observer whose preparation fails on any rank is removed."""
        started = []
        for observer, guard in self._observers:
            guard.run(observer.start)
            if not self._failure.has_occurred(guard.has_failed):
                started.append((observer, guard))
        self._observers = started

    def after_step(self, result: StepResult) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for observer, guard in self._observers:
            values = guard.run(observer.after_step, result) or {}
            # no rank may act on metrics that another rank lacks
            if not observer.communicates(result) or not self._failure.has_occurred(guard.has_failed):
                metrics |= values
        return metrics

    def close(self) -> None:
        for observer, guard in self._observers:
            guard.run(observer.close)


def build_observers(
    config: Config, runtime: Runtime, shard_set: AnySet, plan: Plan, networks: Networks, loader: Loader,
    sink: MetricsSink, non_finite: NonFiniteSteps, wrap: Wrap, start: StartState,
) -> ObserverList:  # fmt: skip
    """Build and start all observers of a run; every rank calls this.

    Args:
        wrap: iterates over the images of an evaluation (``HangDetector.wrap``).

    Raises:
        ShardError, StreamtrainError: if the images of ``evaluation`` cannot be opened.
    """
    images, why_not = held_out(config, shard_set) if config.evaluation.every else (None, "")
    if why_not:
        kind = "of data.shards" if images is None else "by labels"
        logger.info("no evaluation %s: %s; set evaluation.train to a labelled set", kind, why_not)
    student, teacher = networks.student, networks.teacher
    failure = SharedFailure(config.engine.collective_timeout_seconds)
    speed = SpeedMeter(config, runtime, teacher, loader, sink, plan.all_gather_bytes_per_step)
    observers = ObserverList(
        [
            StartFiles(config, runtime, shard_set.num_samples, plan),
            Diagnostics(config, non_finite, loader.describe_samples, sink),
            speed,
            Evaluation(config, runtime, teacher, images, sink, wrap, start, failure),
            CropPictures(config, sink),
            FeatureMaps(config, runtime, teacher, images, shard_set, sink, start.step, failure),
            Histograms(student, sink),
            Trace(config, runtime.rank, sink, start.step),
        ],
        failure,
    )
    observers.start()
    # the evaluation before training is no part of the first step
    speed.clock.restart()
    sink.start_progress()
    return observers


class Diagnostics(Observer):
    """Records non-finite steps; warns of sudden rises of the loss and of collapse metrics outside their bounds."""

    def __init__(
        self, config: Config, non_finite: NonFiniteSteps, describe_images: Callable[[Any], list[dict[str, Any]]],
        sink: MetricsSink,
    ) -> None:  # fmt: skip
        """``describe_images``: returns shard and key of the image at each slot."""
        self._config, self._sink, self._non_finite, self._describe_images = config, sink, non_finite, describe_images
        self._spikes = SpikeDetector(config.monitor.spike_window, config.monitor.spike_score)
        self._collapse = CollapseDetector(config.monitor.collapse)

    def communicates(self, result: StepResult) -> bool:
        return not result.applied

    def after_step(self, result: StepResult) -> dict[str, float]:
        metrics = {"optim/skipped_steps": float(self._non_finite.skipped)}
        if not result.applied:
            features = [target.features for target in result.targets]
            parts = (result.batches, features, result.losses)
            line = self._non_finite.record(result.step, *parts, result.metrics(), self._describe_images)
            self._sink.warn(result.step, line)
        score, warning = self._spikes.add(result.step, result.mean_losses["total"])
        if score is not None:
            metrics["watch/loss_z"] = score
        if warning is not None:
            first, last = result.batches[0].slots[0], result.batches[-1].slots[-1]
            self._sink.warn(result.step, f"{warning} (slots {first} to {last} on rank 0)")
        if result.collapse is not None:
            metrics |= result.collapse.values | measure_inputs(result.batches[0].global_crops, self._config.crops)
            for line in self._collapse.warnings(result.step, result.collapse):
                self._sink.warn(result.step, line)
            metrics["watch/collapse"] = float(self._collapse.num_out_of_bounds)
        return metrics


class SpeedMeter(Observer):
    """Measures speed, memory and the time of an all-gather."""

    def __init__(
        self, config: Config, runtime: Runtime, teacher: Teacher, loader: Loader, sink: MetricsSink,
        all_gather_bytes: int,
    ) -> None:  # fmt: skip
        """``all_gather_bytes``: received by each rank in a step."""
        self._config, self._runtime, self._teacher = config, runtime, teacher
        self._loader, self._sink, self._all_gather_bytes = loader, sink, all_gather_bytes
        peak = config.monitor.peak_flops
        if peak is None and runtime.on_gpu:
            peak = peak_flops(torch.cuda.get_device_name(runtime.device), runtime.dtype == torch.bfloat16)
        # a frozen teacher has its own size
        teacher_config = frozen_teacher_config(config) if config.teacher.kind == "frozen" else None
        self._flops = lru_cache(lambda sizes: step_flops(config, runtime.world_size, sizes, teacher_config).model)
        self._global_batch, _ = config.batch_split(runtime.world_size)
        self.clock = StepClock(None if peak is None else peak * runtime.world_size)

    def communicates(self, result: StepResult) -> bool:
        return self._runtime.world_size > 1 and is_due(result.step, self._config.monitor.histogram_every)

    def after_step(self, result: StepResult) -> dict[str, float]:
        metrics = self.clock.tick(self._work(result.batches[0]), self._loader.wait_seconds)
        metrics |= memory_scalars(self._runtime.device)
        metrics["speed/monitor_share"] = self._sink.stopwatch.share
        if self.communicates(result):
            seconds, num_bytes = self._teacher.gather_seconds()
            metrics["speed/all_gather_seconds"] = seconds / num_bytes * self._all_gather_bytes
        return metrics

    def _work(self, batch: Batch) -> Work:
        """Return the work of a step; ``batch`` is one of its micro-batches."""
        gram_size = None if batch.gram_crops is None else tuple(batch.gram_crops.shape[1:3])
        sizes = CropSizes.of(tuple(batch.global_crops.shape[1:3]), tuple(batch.local_crops.shape[1:3]), gram_size)
        model, crops = self._config.model, self._config.crops
        tokens = sum(
            count * (1 + model.num_registers + size.patches(model.patch_size))
            for count, size in ((crops.global_count, sizes.global_size), (crops.local_count, sizes.local_size))
        )
        return Work(self._global_batch, self._global_batch * tokens, self._flops(sizes))


class Evaluation(Observer):
    """Evaluates the teacher on held-out images, and shows their features in TensorBoard's projector."""

    def __init__(
        self, config: Config, runtime: Runtime, teacher: Teacher, images: HeldOut | None, sink: MetricsSink,
        wrap: Wrap, start: StartState, failure: SharedFailure,
    ) -> None:  # fmt: skip
        """``images``: None disables the evaluation on them."""
        self._every, self._teacher, self._sink, self._wrap = config.evaluation.every, teacher, sink, wrap
        self._evaluation = OnlineEvaluation(config, images, runtime, failure, reference_images(config))
        self._projector, self._before = BestEffort("the projector"), BestEffort("the evaluation before training")
        self._config, self._start = config, start

    def start(self) -> None:
        """Evaluate the starting network and the pixels if the run is new; if that fails, the run has no baselines."""
        if not self._start.is_resumed and has_evaluation(self._config, self._start.step):
            self._before.run(self._measure_baselines)

    def _measure_baselines(self) -> None:
        step, is_trained = self._start.step, self._start.source is not None
        baselines = self._evaluation.run_before_training(self._teacher.features, self._wrap, step, is_trained)
        if baselines:
            self._sink.log_before_training(baselines.start)
            if self._sink.has_trackers:
                self._projector.run(self._show_features, step)

    def communicates(self, result: StepResult) -> bool:
        return is_due(result.step, self._every)

    def after_step(self, result: StepResult) -> dict[str, float]:
        if not self.communicates(result):
            return {}
        metrics = self._evaluation.run(self._teacher.features, self._wrap)
        if metrics and self._sink.has_trackers:
            with self._sink.stopwatch:
                self._projector.run(self._show_features, result.step)
        return metrics

    def _show_features(self, step: int) -> None:
        if features := self._evaluation.thumbnails():
            self._sink.embedding(step, *features)


@dataclass(eq=False)
class CropPictures(Observer):
    """Draws the crops and masks of a micro-batch."""

    config: Config
    sink: MetricsSink

    def after_step(self, result: StepResult) -> dict[str, float]:
        if self.sink.has_trackers and draws_panels(result.step, self.config):
            with self.sink.stopwatch:
                picture = batch_panel(result.batches[0], self.config)
                self.sink.image(result.step, picture)
        return {}


class FeatureMaps(Observer):
    """Draws the teacher's patch features of held-out images, or of training images if there are none."""

    def __init__(
        self, config: Config, runtime: Runtime, teacher: Teacher, images: HeldOut | None, shard_set: AnySet,
        sink: MetricsSink, start_step: int, failure: SharedFailure,
    ) -> None:  # fmt: skip
        self._config, self._runtime, self._teacher, self._sink = config, runtime, teacher, sink
        self._held_out, self._shard_set, self._start_step, self._failure = images, shard_set, start_step, failure
        self._maps: MapsOverTime | None = None
        self._images: list[Tensor] = []
        self._drawing = BestEffort("drawing of feature maps")

    def start(self) -> None:
        """Read the images; draw the first maps if the run is new."""
        config = self._config
        if not config.monitor.panel_every or not (config.monitor.tensorboard or config.monitor.trackers):
            return
        crops = self._failure.run(self._read_crops)
        self._images = [torch.from_numpy(crop) for crop in crops]
        if self._start_step == 0:
            self._embed_and_draw(0)

    def communicates(self, result: StepResult) -> bool:
        return bool(self._images) and result.step > 1 and draws_panels(result.step, self._config)

    def after_step(self, result: StepResult) -> dict[str, float]:
        if self.communicates(result):
            with self._sink.stopwatch:
                self._embed_and_draw(result.step)
        return {}

    def _read_crops(self) -> list[np.ndarray]:
        """Return centre crops larger than the global crops, none for a remote set; rank 0 prepares their maps."""
        count, images = self._config.monitor.panel_samples, self._held_out
        size = map_size(self._config.square_side, self._config.model.patch_size)
        if images is None and self._shard_set.is_remote:
            return []
        background = self._config.data.background_color
        chosen = sample_images(images.test, count) if images else first_images(self._shard_set, count, background)
        # all ranks need equally many images, so a grey one replaces an unusable one
        crops = [decode_crop(chosen, index, size, size)[0] for index in range(len(chosen))]
        if reasons := chosen.unusable.new_reasons():
            logger.warning("images shown grey in the feature maps: %s", reasons)
        if crops and self._runtime.rank == 0:
            pictures = [shown_crops(crop, self._config) for crop in crops]
            self._maps = MapsOverTime(pictures, Path(self._config.run.dir) / MAPS_NAME, self._start_step)
        return crops

    def _embed_and_draw(self, step: int) -> None:
        """Embed the images on all ranks, because the teacher is sharded; rank 0 draws."""
        if not self._images:
            return
        # each chunk needs as much memory as the teacher pass of a step
        relative_area = (len(self._images[0]) / self._config.square_side) ** 2
        chunk = max(1, int(self._config.crops.global_count * self._config.data.micro_batch / relative_area))
        features: list[Tensor] = []
        for start in range(0, len(self._images), chunk):
            images = [image.to(self._runtime.device) for image in self._images[start : start + chunk]]
            features += embed_maps(self._teacher.features, images, self._config.model.patch_size)
        if self._maps is not None:
            self._drawing.run(self._draw, self._maps, step, features)

    def _draw(self, maps: MapsOverTime, step: int, features: list[Tensor]) -> None:
        maps.add(step, features)
        self._sink.image(step, maps.components_page(), "features/pca")
        self._sink.image(step, maps.similarity_page(), "features/similarity")


@dataclass(eq=False)
class Histograms(Observer):
    """Shows histograms of weights, gradients and prototype mass at the steps that measured them."""

    student: Student
    sink: MetricsSink

    def after_step(self, result: StepResult) -> dict[str, float]:
        if result.gradient_samples and self.sink.has_trackers:
            with self.sink.stopwatch:
                values = {f"weights/{part}": sample for part, sample in self.student.weight_samples().items()}
                values |= {f"gradients/{part}": sample for part, sample in result.gradient_samples.items()}
                if result.prototype_mass is not None:
                    values["teacher/prototype_mass"] = result.prototype_mass.log10()
                for tag, sample in values.items():
                    self.sink.histogram(result.step, tag, sample)
        return {}


class Trace(Observer):
    """Traces the steps of ``monitor.profile``."""

    def __init__(self, config: Config, rank: int, sink: MetricsSink, start_step: int) -> None:
        self._config, self._rank, self._sink, self._start_step = config, rank, sink, start_step
        self._profiler: Profiler | None = None

    def start(self) -> None:
        settings = self._config.monitor.profile
        self._profiler = Profiler(Path(self._config.run.dir), settings, self._rank, self._start_step)

    def after_step(self, result: StepResult) -> dict[str, float]:
        assert self._profiler is not None
        with self._sink.stopwatch:
            self._profiler.step_completed(result.step)
        return {}

    def close(self) -> None:
        if self._profiler is not None:
            self._profiler.close()


class StartFiles(Observer):
    """Writes the files that describe the run; on a full or failing disk it tries again after later steps."""

    def __init__(self, config: Config, runtime: Runtime, num_images: int, planned: Plan) -> None:
        """``num_images``: of ``data.shards``."""
        self._config, self._runtime = config, runtime
        self._computed = {**runtime.description, "images": num_images, PLANNED_PEAK: planned.step_bytes}
        self._is_written = runtime.rank > 0
        self._next_attempt = 0.0

    def start(self) -> None:
        if (error := self._write()) is not None:
            logger.warning(
                "config.yaml and environment.json cannot be written to %s (%s); training continues and tries again",
                self._config.run.dir, error.strerror,
            )  # fmt: skip

    def after_step(self, result: StepResult) -> dict[str, float]:
        if not self._is_written and time.monotonic() >= self._next_attempt:
            self._write()
        return {}

    def close(self) -> None:
        self._write()

    def _write(self) -> OSError | None:
        """Write the files unless they are written; return the error if that fails."""
        self._next_attempt = time.monotonic() + RETRY_SECONDS
        config, runtime = self._config, self._runtime
        try:
            if not self._is_written:
                describe_run(Path(config.run.dir), config, runtime.world_size, self._computed)
        except OSError as error:
            return error
        self._is_written = True
        return None
