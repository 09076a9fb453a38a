"""What a run shows of itself and of its network while it trains; none of it affects a result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards.reading.mixture import AnySet
from streamtrain.checkpoint.retention import best_value
from streamtrain.config.crops import CropSizes
from streamtrain.config.load import to_yaml
from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch
from streamtrain.data.still_images import centre_crop
from streamtrain.engine.runtime import Runtime
from streamtrain.engine.teacher import Teacher
from streamtrain.engine.zero import Student
from streamtrain.evaluation.held_out import first_images, held_out, sample_images
from streamtrain.evaluation.images import LabelledImages
from streamtrain.evaluation.maps import map_size
from streamtrain.evaluation.online import OnlineEvaluation, embed_maps
from streamtrain.evaluation.over_time import MapsOverTime
from streamtrain.objective.prototypes import prototype_mass
from streamtrain.objective.targets import Targets
from streamtrain.planning.flops import step_flops
from streamtrain.planning.memory import Plan
from streamtrain.planning.peak import peak_flops
from streamtrain.planning.plan_text import model_table, table
from streamtrain.reporting.monitor import Monitor
from streamtrain.reporting.panel import batch_panel
from streamtrain.reporting.profiler import Profiler
from streamtrain.reporting.usage import StepClock, Stopwatch, Work, memory_scalars
from streamtrain.training.distill import frozen_teacher_config

MAPS_NAME = "maps.npz"
Beating = Callable[[Iterable[Any]], Iterable[Any]]


class Observer:
    """Scalars, pictures and evaluations of a run; all ranks call every method alike, rank 0 reports."""

    def __init__(
        self, config: Config, runtime: Runtime, shard_set: AnySet, planned: Plan, student: Student, teacher: Teacher,
        step: int,
    ) -> None:
        """``step``: completed ones, of the checkpoint that the run goes on from.

        Raises:
            ShardError, StreamtrainError: if the images of ``evaluation`` are not there.
        """
        run_dir = Path(config.run.dir)
        self._config, self._runtime, self._planned = config, runtime, planned
        self._student, self._teacher = student, teacher
        self.monitor = Monitor(run_dir, config, rank=runtime.rank, start_step=step)
        self._profiler = Profiler(run_dir, config.monitor.profile, runtime.rank)
        peak = config.monitor.peak_flops
        if peak is None and runtime.on_gpu:
            peak = peak_flops(torch.cuda.get_device_name(runtime.device), runtime.dtype == torch.bfloat16)
        self._peak_flops = None if peak is None else peak * runtime.world_size
        # a frozen teacher's arithmetic is its own
        guide = frozen_teacher_config(config) if config.teacher.kind == "frozen" else None
        self._flops = lru_cache(lambda sizes: step_flops(config, runtime.world_size, sizes, guide).model)

        images, why_not = held_out(config, shard_set) if config.evaluation.every else (None, "")
        if why_not and runtime.rank == 0:
            print(f"no evaluation while training: {why_not}; set evaluation.train to a labelled set", flush=True)
        self._evaluation = OnlineEvaluation(
            config, images, runtime.rank, runtime.world_size, runtime.device, runtime.launch.cores
        )
        # of this step's checkpoint, where it is the best so far
        self.best: dict[str, Any] | None = None
        self._maps: MapsOverTime | None = None
        self._map_images: list[torch.Tensor] = []
        # alike on all ranks, of which rank 0 shows what they have found together
        self._pictures = bool(config.monitor.tensorboard or config.monitor.trackers)
        self._mass: torch.Tensor | None = None
        if config.monitor.panel_every and self._pictures:
            crops = self._crops_for_maps(images.test if images is not None else None, shard_set)
            self._map_images = [torch.from_numpy(crop) for crop in crops]
            if runtime.rank == 0 and crops:
                self._maps = MapsOverTime(crops, run_dir / MAPS_NAME, step)
        self.monitor.text("run/config", f"```yaml\n{to_yaml(config)}```")
        self.monitor.text("run/plan", f"```\n{table(planned, runtime.world_size)}\n```")
        self.monitor.text("run/model", f"```\n{model_table(config)}\n```")
        if step == 0:
            self._show_maps(0)
        self._clock, self._monitoring = StepClock(self._peak_flops), Stopwatch()

    def begin(self, step: int) -> None:
        """Before ``step`` (from 1)."""
        self._profiler.begin(step)
        self._student.sample_gradients = self.monitor.shows and due(step, self._config.monitor.histogram_every)

    def look(self, step: int, targets: Targets) -> None:
        """At what the teacher asks in ``step`` (from 1) of a micro-batch, before the teacher changes."""
        self._mass = None
        features, handle = targets.features.global_features, targets.teacher_prototypes.global_head
        due_now = self._pictures and due(step, self._config.monitor.histogram_every)
        if due_now and features is not None and handle is not None:
            chunk_bytes = self._config.objective.chunk_bytes
            self._mass = prototype_mass(features, handle, targets.teacher_temperature, chunk_bytes)

    def scalars(self, batch: Batch, global_batch: int, wait_seconds: float) -> dict[str, float]:
        """Speed, cost and memory of the step that ends now; ``batch`` is one of its micro-batches."""
        sizes = CropSizes(
            batch.global_crops.shape[1],
            batch.local_crops.shape[1],
            None if batch.gram_crops is None else batch.gram_crops.shape[1],
        )
        model, crops = self._config.model, self._config.crops
        prefix = 1 + model.num_registers
        tokens = sum(
            count * (prefix + (size // model.patch_size) ** 2)
            for count, size in ((crops.global_count, sizes.global_size), (crops.local_count, sizes.local_size))
        )
        work = Work(global_batch, global_batch * tokens, self._flops(sizes))
        found = self._clock.tick(work, wait_seconds) | memory_scalars(self._runtime.device)
        return found | {"speed/monitor_share": self._monitoring.share}

    def evaluate(self, step: int, beating: Beating, settle: Callable[[], None]) -> dict[str, float]:
        """The figures of the evaluators where they are due after ``step``; ``best`` then says whether they are.

        Args:
            settle: waits until checkpoints are written, since only one that is there can be the best.
        """
        self.best = None
        found: dict[str, float] = {}
        if due(step, self._config.monitor.histogram_every) and self._runtime.world_size > 1:
            seconds, num_bytes = self._teacher.gather_seconds()
            found["speed/all_gather_seconds"] = seconds / num_bytes * self._planned.all_gather_bytes_per_step
        if due(step, self._config.evaluation.every):
            figures = self._evaluation.run(self._teacher, beating)
            metric = self._config.evaluation.best
            if metric is not None and f"eval/{metric}" in figures:
                settle()
                value, run_dir = figures[f"eval/{metric}"], Path(self._config.run.dir)
                if self._evaluation.improved(value, best_value(run_dir, metric, step)):
                    self.best = {"step": step, "metric": metric, "value": value}
            found |= figures
        return found

    def report(self, step: int, slot: int, scalars: Mapping[str, float], batch: Batch) -> None:
        """Everything of the completed ``step``: scalars always, pictures and histograms where they are due."""
        with self._monitoring:
            self.monitor.log(step, slot, scalars)
            if told := self._profiler.end(step):
                logger.info(told)
            if due(step, self._config.monitor.panel_every) or step == 1:
                if self.monitor.shows:
                    self.monitor.panel(step, batch_panel(batch, self._config.monitor.panel_samples))
                if step > 1:
                    self._show_maps(step)
            if self.monitor.shows and due(step, self._config.monitor.histogram_every):
                for part, values in self._student.weight_samples().items():
                    self.monitor.histogram(step, f"weights/{part}", values)
                for part, values in self._student.gradient_samples.items():
                    self.monitor.histogram(step, f"gradients/{part}", values)
                if self._mass is not None:
                    self.monitor.histogram(step, "teacher/prototype_mass", self._mass.log10())
            if self.monitor.shows and "eval/seconds" in scalars and (shown := self._evaluation.thumbnails()):
                self.monitor.embedding(step, *shown)

    def close(self) -> None:
        self._profiler.close()
        self.monitor.close()

    def _crops_for_maps(self, test: LabelledImages | None, shard_set: AnySet) -> list[np.ndarray]:
        """Held-out images, or some of the set where there are none, larger than the global crops."""
        count = self._config.monitor.panel_samples
        size = map_size(self._config.crops.global_size, self._config.model.patch_size)
        if test is None and shard_set.is_remote:
            return []
        shown = (sample_images(test, count) if test is not None else first_images(shard_set, count)).lenient()
        return [centre_crop(shown.decode(index), size, size) for index in range(len(shown))]

    def _show_maps(self, step: int) -> None:
        """All ranks embed the images, since each has a part of the network."""
        if not self._map_images:
            return
        # as many at once as take the room of the teacher's pass
        crops = self._config.crops
        larger = (len(self._map_images[0]) / crops.global_size) ** 2
        at_once = max(1, int(crops.global_count * self._config.data.micro_batch / larger))
        features = []
        for start in range(0, len(self._map_images), at_once):
            images = [image.to(self._runtime.device) for image in self._map_images[start : start + at_once]]
            features += embed_maps(self._teacher, images, self._config.model.patch_size)
        if self._maps is not None:
            self._maps.add(step, features)
            self.monitor.panel(step, self._maps.components_page(), "features/pca")
            self.monitor.panel(step, self._maps.similarity_page(), "features/similarity")


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after ``step``."""
    return every > 0 and step % every == 0
