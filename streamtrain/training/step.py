"""One optimiser step: scheduled values, teacher pass, targets, student pass, update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from streamtrain.config.schedules import value_at
from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch
from streamtrain.diagnostics.collapse import CollapseMetrics, measure_collapse
from streamtrain.engine.runtime import Runtime
from streamtrain.objective.prototypes import prototype_mass
from streamtrain.objective.targets import Targets
from streamtrain.training.build import Networks
from streamtrain.training.ssl_model import LossWeights

# yields the items of an iterable unchanged, such as ``HangDetector.wrap``, which marks progress at each
Wrap = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class StepValues:
    """The scheduled values of one optimiser step."""

    lr: float
    weight_decay: float
    momentum: float
    teacher_temperature: float
    # a feature teacher's targets have no temperature
    has_temperature: bool
    last_layer_frozen: bool
    backbone_frozen: bool
    weights: LossWeights

    @classmethod
    def at(cls, step: int, config: Config, global_batch: int) -> StepValues:
        """Return the values of the step that follows ``step`` completed ones."""
        schedules, objective, steps = config.schedules, config.objective, config.run.steps
        return cls(
            lr=value_at(schedules.lr, step, steps) * config.optim.lr_factor(global_batch),
            weight_decay=value_at(schedules.weight_decay, step, steps),
            momentum=value_at(schedules.momentum, step, steps),
            teacher_temperature=value_at(schedules.teacher_temperature, step, steps),
            has_temperature=config.teacher.model is None,
            last_layer_frozen=step < schedules.freeze_last_layer,
            backbone_frozen=step < config.init.freeze_backbone_steps,
            weights=LossWeights(
                global_loss=value_at(objective.global_loss.weight, step, steps),
                patch_loss=value_at(objective.patch_loss.weight, step, steps),
                koleo=value_at(objective.koleo.weight, step, steps),
                gram=value_at(objective.gram.weight, step, steps),
                anchor=value_at(objective.anchor.weight, step, steps),
                local_loss=value_at(objective.global_loss.local_weight, step, steps),
            ),
        )

    def metrics(self) -> dict[str, float]:
        """Return the optimiser's and the teacher's values by tag."""
        metrics = {
            "optim/lr": self.lr,
            "optim/weight_decay": self.weight_decay,
            "teacher/momentum": self.momentum,
        }
        return metrics | ({"teacher/temperature": self.teacher_temperature} if self.has_temperature else {})


@dataclass(frozen=True)
class StepResult:
    """A completed optimiser step, for the observers and the checkpoint policy."""

    # counted from 1
    step: int
    # first slot of the next step
    next_slot: int
    values: StepValues
    # this rank's, one entry per micro-batch
    batches: Sequence[Batch]
    targets: Sequence[Targets]
    losses: Sequence[dict[str, Tensor]]
    # averaged over micro-batches and ranks
    mean_losses: dict[str, float]
    # False: a loss or gradient of some rank was non-finite, and no rank applied the update
    applied: bool
    gradient_norms: dict[str, float]
    # highest exit code requested on any rank; 0: continue
    stop_request: int
    # measured before the teacher's update; None if not due
    collapse: CollapseMetrics | None
    prototype_mass: Tensor | None
    # samples of this rank's gradient by part of the network; empty if not due
    gradient_samples: dict[str, Tensor]

    def metrics(self) -> dict[str, float]:
        """Return losses, scheduled values and gradient norms by tag."""
        losses = {f"loss/{name}": value for name, value in self.mean_losses.items()}
        return losses | self.values.metrics() | self.gradient_norms


def train_step(
    step: int,
    config: Config,
    runtime: Runtime,
    networks: Networks,
    loader: Iterator[Batch],
    *,
    wrap: Wrap,
    before_update: Callable[[], None],
    stop_request: Callable[[], int],
) -> StepResult:
    """Run optimiser step ``step`` (counted from 1); every rank calls this.

    Args:
        wrap: iterates over the micro-batches.
        before_update: called before the first change to a value that checkpoints save.
        stop_request: returns the exit code requested on this rank, 0 to continue.
    """
    global_batch, accumulation = config.batch_split(runtime.world_size)
    student, teacher, gram = networks.student, networks.teacher, networks.gram
    values = StepValues.at(step - 1, config, global_batch)
    student.set_rates(values.lr, values.weight_decay, values.last_layer_frozen, values.backbone_frozen)
    student.sample_gradients = draws_histograms(step, config) and runtime.rank == 0

    gram.refresh(step - 1, values.weights.gram, teacher, before_update)
    batches, features = [], []
    for _ in wrap(range(accumulation)):
        batches.append(next(loader))
        # overlaps with the loader, which prepares the next micro-batch
        features.append(networks.target_teacher.teacher_features(batches[-1], values.weights))
    targets = networks.target_maker.make(features, networks.teacher_prototypes, values.teacher_temperature)
    collapse, mass = _measure_teacher(step, config, targets)

    losses = []
    for batch, target in zip(wrap(batches), targets, strict=True):
        target = replace(
            target,
            gram=gram.targets(batch, values.weights.gram),
            anchor=networks.anchor.targets(batch, values.weights.anchor),
        )
        losses.append(student.accumulate(batch, target, values.weights))
        student.step(before_update)
    if student.applied:
        teacher.update(values.momentum)
    else:
        networks.target_maker.revert()

    mean_losses, stop_code, gradient_norms = read_results(losses, stop_request(), student.gradient_norms(), runtime)
    # the slots of a step are contiguous, in equal parts by rank
    slots_per_rank = global_batch // runtime.world_size
    return StepResult(
        step=step,
        next_slot=int(batches[0].slots[0]) + (runtime.world_size - runtime.rank) * slots_per_rank,
        values=values,
        batches=batches,
        targets=targets,
        losses=losses,
        mean_losses=mean_losses,
        applied=student.applied,
        gradient_norms=gradient_norms,
        stop_request=stop_code,
        collapse=collapse,
        prototype_mass=mass,
        gradient_samples=student.gradient_samples if student.sample_gradients else {},
    )


def read_results(
    losses: Sequence[dict[str, Tensor]], exit_code: int, gradient_norms: dict[str, Tensor], runtime: Runtime
) -> tuple[dict[str, float], int, dict[str, float]]:
    """Return the losses averaged over micro-batches and ranks, the highest exit code of any rank, and the norms.

    One all-reduce carries losses and codes, and all ranks get the same code: they must stop at the same step, because a
    collective waits for every rank. The host reads everything at once, because each read waits for the device.
    """
    names = sorted(losses[0])
    mean = torch.stack([torch.stack([loss[name].float() for name in names]) for loss in losses]).mean(0)
    codes = torch.zeros(runtime.world_size, device=mean.device)
    codes[runtime.rank] = exit_code
    message = torch.cat([mean / runtime.world_size, codes])
    dist.all_reduce(message)
    sizes = [len(names), len(codes), len(gradient_norms)]
    values = iter(torch.cat([message, torch.stack(list(gradient_norms.values()))]).tolist())
    means, exit_codes, norms = (list(islice(values, size)) for size in sizes)
    stop_code = int(max(exit_codes))
    return dict(zip(names, means, strict=True)), stop_code, dict(zip(gradient_norms, norms, strict=True))


def is_due(step: int, every: int) -> bool:
    """Return whether ``step`` is a multiple of ``every`` (0: never)."""
    return every > 0 and step % every == 0


def has_evaluation(config: Config, start_step: int) -> bool:
    """Return whether an evaluation is due after ``start_step``."""
    every = config.evaluation.every
    return every > 0 and config.run.steps // every > start_step // every


def draws_panels(step: int, config: Config) -> bool:
    """Return whether crops and feature maps are drawn: at the first, the due and the last step of the run."""
    every = config.monitor.panel_every
    return every > 0 and (step in (1, config.run.steps) or is_due(step, every))


def draws_histograms(step: int, config: Config) -> bool:
    return is_due(step, config.monitor.histogram_every) and bool(config.monitor.tensorboard or config.monitor.trackers)


def _measure_teacher(
    step: int, config: Config, targets: Sequence[Targets]
) -> tuple[CollapseMetrics | None, Tensor | None]:
    """Return the collapse metrics and prototype mass of the teacher that computed ``targets``; None if not due."""
    every = config.monitor.collapse.every
    chunk_bytes = config.objective.chunk_size(on_gpu=targets[0].features.patch_weight.is_cuda)
    collapse = mass = None
    if every and (step == 1 or is_due(step, every)):
        collapse = measure_collapse(targets, config.crops.global_count, config.monitor.collapse.images, chunk_bytes)
    first = targets[0]
    features, prototypes = first.features.global_features, first.teacher_prototypes.global_head
    if draws_histograms(step, config) and features is not None and prototypes is not None:
        mass = prototype_mass(features, prototypes, first.teacher_temperature, chunk_bytes)
    return collapse, mass
