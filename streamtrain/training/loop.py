"""The training run, top to bottom."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image

from shards.reading.mixture import AnySet
from shards.reading.quarantine import Quarantine
from streamtrain.checkpoint.writer import CheckpointPayload, CheckpointWriter
from streamtrain.config.run import RunConfig
from streamtrain.config.schedules import value_at
from streamtrain.config.tree import Config
from streamtrain.data.loader import Loader
from streamtrain.data.stream import check_state
from streamtrain.diagnostics.bad_steps import Evidence
from streamtrain.diagnostics.watch import Watch
from streamtrain.diagnostics.watchdog import Watchdog
from streamtrain.engine.runtime import Launch, Runtime, init_process_group
from streamtrain.engine.teacher import Teacher
from streamtrain.engine.zero import Student
from streamtrain.errors import CheckpointError
from streamtrain.objective.targets import TargetMaker, TeacherPrototypes
from streamtrain.ops.cpu.build import is_enabled
from streamtrain.planning.memory import plan
from streamtrain.planning.plan_text import end_summary, start_summary
from streamtrain.reporting.panel import batch_panel
from streamtrain.reporting.usage import peak_bytes
from streamtrain.run.directory import (
    CHECKPOINTS,
    QUARANTINE_NAME,
    SNAPSHOTS,
    describe_run,
    log_start_notes,
    saved_state,
)
from streamtrain.run.resume_policy import build_provenance, check_resume
from streamtrain.run.signals import SAVE, Requests
from streamtrain.training.build import build_gram_anchor, build_guide, build_networks, restore
from streamtrain.training.gram import GramAnchor
from streamtrain.training.observers import Observer, due
from streamtrain.training.ssl_model import LossWeights

HEADS = ("global_head", "patch_head")


@dataclass(frozen=True)
class StepValues:
    """The scheduled values of one optimiser step."""

    lr: float
    weight_decay: float
    momentum: float
    teacher_temperature: float
    last_layer_frozen: bool
    backbone_frozen: bool
    weights: LossWeights

    @classmethod
    def at(cls, step: int, config: Config, global_batch: int) -> StepValues:
        """Values of the step that follows ``step`` completed ones."""
        schedules, objective, steps = config.schedules, config.objective, config.run.steps
        return cls(
            lr=value_at(schedules.lr, step, steps) * config.optim.lr_factor(global_batch),
            weight_decay=value_at(schedules.weight_decay, step, steps),
            momentum=value_at(schedules.momentum, step, steps),
            teacher_temperature=value_at(schedules.teacher_temperature, step, steps),
            last_layer_frozen=step < schedules.freeze_last_layer,
            backbone_frozen=step < config.init.freeze_backbone_steps,
            weights=LossWeights(
                global_loss=value_at(objective.global_loss.weight, step, steps),
                patch_loss=value_at(objective.patch_loss.weight, step, steps),
                koleo=value_at(objective.koleo.weight, step, steps),
                gram=value_at(objective.gram.weight, step, steps),
                local_loss=value_at(objective.global_loss.local_weight, step, steps),
            ),
        )

    def scalars(self) -> dict[str, float]:
        """The values under the tags they are logged by."""
        return {
            "optim/lr": self.lr,
            "optim/weight_decay": self.weight_decay,
            "teacher/momentum": self.momentum,
            "teacher/temperature": self.teacher_temperature,
        }


def train(
    config: Config,
    launch: Launch,
    shard_set: AnySet,
    resume_from: Path | None = None,
    accepted: Collection[str] = (),
) -> int:
    """Train to ``run.steps``, going on from the run folder's newest checkpoint if it holds one.

    Args:
        config: whose run folder is made.
        shard_set: that of ``data.shards``.
        resume_from: another run's folder to start from when this one's is new.
        accepted: keys of settings that may differ from the checkpoint's.

    Returns:
        The exit status: 0 when the run is complete, 75 or 130 when it was asked to stop early.

    Raises:
        ShardError, StreamtrainError: for what the user can put right, in one line.
    """
    global_batch, accumulation = config.batch_split(launch.world_size)
    run_dir = Path(config.run.dir)

    requests = Requests(run_dir, launch.rank)
    with init_process_group(config.engine, launch) as runtime:
        dtype = runtime.description["dtype"]
        provenance = build_provenance(config, dtype)
        if launch.rank == 0:
            log_start_notes(config, launch.world_size)
        planned = plan(
            config, launch.world_size, on_gpu=runtime.on_gpu, bf16=runtime.dtype == torch.bfloat16,
            kernels=not runtime.on_gpu and usable(runtime.dtype),
        )  # fmt: skip
        logger.info(start_summary(planned, runtime.on_gpu))
        student, teacher = build_networks(config, runtime, accumulation)
        # a frozen network takes the average's place as the one that teaches
        guide = build_guide(config, runtime, accumulation, teacher)
        gram = build_gram_anchor(config, runtime, accumulation)
        target_maker = TargetMaker(config.objective)
        teacher_prototypes = TeacherPrototypes(*(guide.weight(f"{head}.prototypes.weight") for head in HEADS))
        position = restore(config, resume_from, student, teacher, target_maker, gram)
        step, slot = position.step, position.slot
        if position.source is not None and (saved := saved_state(position.source)) is not None:
            # the newest checkpoint, with which the start was compared, may have turned out damaged; and in what this
            # machine computes has only been known since
            check_resume(config, position.source, saved, launch.world_size, accepted, dtype)
        quarantine = Quarantine(run_dir / QUARANTINE_NAME, config.data.max_unusable_share)
        loader = Loader(
            shard_set, config, rank=runtime.rank, world_size=runtime.world_size, device=runtime.device,
            start_slot=slot, end_slot=slot + (config.run.steps - step) * global_batch,
            lane_block=position.lane_block, local_world_size=launch.local_world_size, quarantine=quarantine,
        )
        if position.data:
            check_state(position.data, loader.state_dict(slot), accepted)
        # only now is it certain that this configuration is the run's
        if launch.rank == 0:
            describe_run(run_dir, config, launch.world_size, runtime.description)
        if position.source is not None:
            logger.info(f"resuming at step {step} from {position.source}")
        observer = Observer(config, runtime, shard_set, planned, student, teacher, step)
        monitor = observer.monitor
        watch = Watch(config, step, position.skipped_steps)
        watchdog = Watchdog(run_dir, runtime.rank, config.engine.hang_timeout_seconds)
        saver = CheckpointWriter(run_dir, config.run, launch.local_world_size, config.engine.collective_timeout_seconds)
        with watchdog, closing(loader), closing(observer), closing(saver):
            wish = 0
            while step < config.run.steps:
                observer.begin(step + 1)
                values = StepValues.at(step, config, global_batch)
                student.set_rates(values.lr, values.weight_decay, values.last_layer_frozen, values.backbone_frozen)

                batches = [next(loader) for _ in watchdog.beating(range(accumulation))]
                gram.refresh(step, values.weights.gram, teacher, saver.wait_until_copied)
                features = [guide(batch, None, values.weights) for batch in watchdog.beating(batches)]
                targets = target_maker.make(features, teacher_prototypes, values.teacher_temperature)
                seen = watch.look(step + 1, targets)
                observer.look(step + 1, targets[0])
                losses = []
                for batch, target in zip(watchdog.beating(batches), targets, strict=True):
                    target = replace(target, gram=gram.targets(batch, values.weights.gram))
                    losses.append(student.accumulate(batch, target, values.weights))
                    student.step(saver.wait_until_copied)
                if student.applied:
                    teacher.update(values.momentum)
                else:
                    target_maker.revert()

                step, slot = step + 1, slot + global_batch
                means, wish = agree(losses, requests.stop_code(), runtime)
                scalars = {f"loss/{name}": value for name, value in means.items()} | values.scalars()
                scalars |= student.gradient_norms() | loader.scalars() | saver.scalars()
                scalars |= watch.scalars(step, student.applied, means["total"]) | seen
                scalars |= observer.scalars(batches[0], global_batch, loader.wait_seconds)
                scalars |= observer.evaluate(step, watchdog.beating, saver.wait)
                observer.report(step, slot, scalars, batches[0])
                found = watch.warnings(step, student.applied, scalars, Evidence(batches, features, losses), loader)
                for line in (*found, *saver.warnings()):
                    monitor.warn(step, line)
                places = to_save(step, wish, student.applied, config.run, observer.best is not None)
                if places or not student.applied:
                    # so that the checkpoint begun last is there, should the run end here and name it
                    saver.wait()
                if places:
                    watch.bad_steps.check_weights(step, student.is_finite(), runtime.device)
                    state = provenance | {"data": loader.state_dict(slot), "skipped_steps": watch.bad_steps.skipped}
                    if CHECKPOINTS in places:
                        requests.mark_save_started()
                    made = contents(places, state, student, teacher, target_maker, gram)
                    saver.save(step, made, requests.mark_save_finished, observer.best)
                if wish > SAVE:
                    break
                watch.bad_steps.check(step)
            saver.wait()
            for line in saver.warnings():
                monitor.warn(step, line)
        if wish > SAVE:
            requests.remove_stop_file()
            logger.info(f"stopped at step {step}, {saver.status_message()}; the same command goes on")
        elif saver.failure:
            raise CheckpointError(f"all steps are done, but {saver.status_message()}; mend that and start the same command again")
        logger.info(end_summary(planned, runtime.on_gpu, peak_bytes(runtime.device)))
    return wish if wish > SAVE else 0


def to_save(step: int, wish: int, applied: bool, config: RunConfig, best: bool = False) -> list[str]:
    """Which places get something after ``step``, which changed the weights or not, and made the ``best`` or not."""
    places = []
    if wish or step == config.steps or (applied and (best or due(step, config.checkpoint_every))):
        places.append(CHECKPOINTS)
    if applied and due(step, config.snapshot_every):
        places.append(SNAPSHOTS)
    return places


def contents(
    places: list[str],
    state: dict[str, Any],
    student: Student,
    teacher: Teacher,
    target_maker: TargetMaker,
    gram: GramAnchor,
) -> dict[str, CheckpointPayload]:
    """What goes into a checkpoint, and into a snapshot of the teacher, where those are among ``places``."""
    shapes = {name: fragment.shape for name, fragment in student.fragments.items()}
    averages = teacher.shards()
    whole = CheckpointPayload(student.shards() | averages | gram.shards(), target_maker.state_dict(), shapes, state)
    return {place: whole if place == CHECKPOINTS else CheckpointPayload(averages, {}, shapes, {}) for place in places}


def agree(
    losses: list[dict[str, torch.Tensor]], exit_code: int, runtime: Runtime
) -> tuple[dict[str, float], int]:
    """Losses averaged over micro-batches and ranks, and the largest exit status that any rank wants.

    Both travel together: all ranks must leave at the same step, since a collective waits for everyone.
    """
    names = sorted(losses[0])
    mean = torch.stack([torch.stack([loss[name].float() for name in names]) for loss in losses]).mean(0)
    wanted = torch.zeros(runtime.world_size, device=mean.device)
    wanted[runtime.rank] = exit_code
    message = torch.cat([mean / runtime.world_size, wanted])
    dist.all_reduce(message)
    values = message.tolist()
    return dict(zip(names, values, strict=False)), int(max(values[len(names) :]))


def dry_run(config: Config, shard_set: AnySet) -> int:
    """Draw one panel of crops into the run folder; one rank calls it."""
    picture = Path(config.run.dir) / "dry_run.png"
    end_slot = config.data.micro_batch
    with closing(Loader(shard_set, config, rank=0, world_size=1, device="cpu", end_slot=end_slot)) as loader:
        Image.fromarray(batch_panel(next(loader), config.monitor.panel_samples)).save(picture)
    print(f"{shard_set.num_samples} samples in {config.data.shards_text}; crops drawn in {picture}")
    return 0
