"""Checks before a run starts: memory, disk space and folders. Torch-free."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from shards.reading.mixture import AnySet
from shards.storage.store import is_url
from streamtrain.config.recipes import leaves
from streamtrain.config.tree import Config
from streamtrain.engine.meeting import StartFacts
from streamtrain.engine.rendezvous import Launch
from streamtrain.engine.runtime import uses_bf16, uses_gpu
from streamtrain.errors import ConfigError, StreamtrainError
from streamtrain.ops.cpu.features import has_kernels
from streamtrain.planning.memory import Plan, plan
from streamtrain.planning.sizes import CPU_KERNELS, StoredImages
from streamtrain.planning.units import size
from streamtrain.run.directory import CHECKPOINTS, SNAPSHOTS, saved_steps
from streamtrain.run.machine import Space, disk_space, folder_bytes, host_memory
from streamtrain.run.provenance import program_versions
from streamtrain.run.resume_policy import DISK_KEY, MEMORY_KEY

# plans were accurate within about 10 % (benchmarks/results/memory_of_runs.json)
_PLAN_MARGIN = 1.1
# up to this width, the host is estimated to limit a step on a GPU (not measured); micro-batches to recommend, largest
# first
_SMALL_DIM, _GPU_MICRO_BATCHES = 768, (128, 64)
# may differ between machines: contents are compared, not paths
_OWN_SETTINGS = ("run.dir", "data.shards", "data.cache.dir", "engine.moments_dir", "engine.cpu_threads")


def check_resources(
    config: Config, launch: Launch, accepted: Collection[str], *, on_gpu: bool, images: StoredImages | None = None
) -> list[str]:
    """Compare the planned memory and disk space with this machine's, and return warnings; every rank calls this.

    Args:
        images: the stored images, if known.
        accepted: keys of ``--accept``; ``memory`` and ``disk`` turn a refusal into a warning.

    Raises:
        StreamtrainError: the machine has clearly less memory than planned, or no space for a single checkpoint.
    """
    planned, ranks = plan_of_start(config, launch, on_gpu=on_gpu, images=images), launch.local_world_size
    gpu = _gpu_memory(launch.local_rank) if on_gpu else None
    needs = [_Need("GPU memory", planned.gpu_bytes, 1, gpu)] if on_gpu else []
    needs.append(_Need("memory", planned.rank_host_bytes, ranks, host_memory()))
    warnings = [line for need in needs if (line := need.check(config, accepted))]
    if launch.rank == 0:
        warnings += _check_disk(config, launch.world_size, planned, accepted)
        if gpu is not None and (line := _larger_micro_batch(config, launch, gpu, images)):
            warnings.append(line)
        cores = launch.shared_cores
        if not on_gpu and ranks > cores and not launch.has_own_cores:
            warnings.append(f"{ranks} ranks share {cores} core(s), which makes a step slower; start at most {cores}")
    return warnings


def _larger_micro_batch(config: Config, launch: Launch, gpu: Space, images: StoredImages | None) -> str | None:
    """Return a recommendation for a new run of a small network with a small micro-batch; None if none fits."""
    current = config.data.micro_batch
    if config.model.dim > _SMALL_DIM or current >= min(_GPU_MICRO_BATCHES) or saved_steps(Path(config.run.dir)):
        return None
    for larger in _GPU_MICRO_BATCHES:
        changed = config.model_copy(update={"data": config.data.model_copy(update={"micro_batch": larger})})
        try:
            step_images, _ = changed.batch_split(launch.world_size)
            planned = plan_of_start(changed, launch, on_gpu=True, images=images)
        except ConfigError:
            continue  # it does not divide data.global_batch
        if planned.gpu_bytes <= gpu.free:
            more = "" if config.data.global_batch else f", with {step_images} images per step"
            return (
                f"data.micro_batch is {current}, so the host may limit the speed of this small network; "
                f"data.micro_batch={larger} needs {size(planned.gpu_bytes)} of {size(gpu.free)}{more}"
            )
    return None


def start_facts(config: Config, shard_set: AnySet, launch: Launch) -> StartFacts:
    """Return settings, images, versions, precision and run directory, which must be equal on all ranks."""
    values = {key: repr(value) for key, value in leaves(config) if key not in _OWN_SETTINGS}
    values |= {f"the version of {name}": version for name, version in program_versions().items()}
    bf16 = uses_bf16(config.engine, uses_gpu(config.engine, launch))
    values["the precision of engine.dtype"] = "bf16" if bf16 else "fp32"
    return StartFacts({**values, "the digest of the images": shard_set.digest}, Path(config.run.dir))


def check_folders(config: Config) -> None:
    """Check that folders with different purposes differ.

    Raises:
        ConfigError: a new run directory is inside a shard set, or an evaluation would test on its training images.
    """
    run_dir, evaluation = Path(config.run.dir).resolve(), config.evaluation
    train, test = (None if path is None else Path(path).resolve() for path in (evaluation.train, evaluation.test))
    if train is not None and train == test:
        raise ConfigError(
            f"evaluation.test is evaluation.train ({train}), so every test image would be its own nearest neighbour; "
            "leave out evaluation.test to hold out a fifth of the images"
        )
    for share in config.data.shares:
        shards = share.shards
        if not is_url(shards) and run_dir.is_relative_to(Path(shards).resolve()) and not saved_steps(run_dir):
            raise ConfigError(f"run.dir {config.run.dir} is inside the shard set {shards}; set it to another folder")


def plan_of_start(
    config: Config, launch: Launch, *, on_gpu: bool, bf16: bool | None = None, kernels: bool | None = None,
    images: StoredImages | None = None,
) -> Plan:  # fmt: skip
    """Plan a run on this machine.

    Args:
        bf16: compute in bf16; None: as this machine is expected to choose, without loading torch.
        kernels: use the CPU kernels; None: as for ``bf16``.
        images: the stored images, if known.
    """
    bf16 = uses_bf16(config.engine, on_gpu) if bf16 is None else bf16
    kernels = has_kernels(bf16) if kernels is None else kernels
    memory = host_memory()
    return plan(
        config, launch.world_size, on_gpu=on_gpu, bf16=bf16, supported=CPU_KERNELS if kernels else "reference",
        images=images, cores=launch.cores, host_memory=memory and memory.free,
    )  # fmt: skip


def _gpu_memory(index: int) -> Space:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    return Space(total, free)


class _Need(NamedTuple):
    """Planned memory of ranks that share it."""

    name: str
    rank_bytes: int
    ranks: int
    available: Space | None

    def check(self, config: Config, accepted: Collection[str]) -> str | None:
        """Return a warning if less is free, None if it fits; raise StreamtrainError if the total is too small."""
        needed, available = self.rank_bytes * self.ranks, self.available
        if available is None or needed <= available.free:
            return None
        total = size(available.total)
        is_refused = needed > _PLAN_MARGIN * available.total
        each = f" ({self.ranks} ranks x {size(self.rank_bytes)})" if self.ranks > 1 else ""
        held = total if is_refused else f"{size(available.free)} free of {total}"
        fewer = ", start fewer ranks" if self.ranks > 1 else ""
        line = (
            f"the run needs about {size(needed)} of {self.name}{each}, but this machine has {held}; lower "
            f"data.micro_batch (now {config.data.micro_batch}){fewer} or use settings that `streamtrain plan --fit` "
            "finds"
        )
        if is_refused and MEMORY_KEY not in accepted:
            raise StreamtrainError(f"{line}; to start anyway, add --accept {MEMORY_KEY}")
        return line


def _check_disk(config: Config, world_size: int, planned: Plan, accepted: Collection[str]) -> list[str]:
    """Return a warning if the disk of ``run.dir`` has less space than the planned checkpoints take, or refuse."""
    run_dir, run = Path(config.run.dir), config.run
    space = disk_space(run_dir)
    if space is None:
        return []
    present = sum(folder_bytes(run_dir / kind) for kind in (CHECKPOINTS, SNAPSHOTS))
    needed = _saved_bytes(planned) - present
    if needed <= space.free:
        return []
    one, free = _saved_bytes(plan(_with_one_checkpoint(config), world_size)), size(space.free)
    remedy = f"free some space or set run.dir (now {run_dir}) to another disk"
    # a run with a checkpoint may resume without space, because it may come back
    if one > space.free and not saved_steps(run_dir):
        line = f"a checkpoint takes {size(one)}, but the disk of run.dir has {free} free; {remedy}"
        if DISK_KEY not in accepted:
            raise StreamtrainError(f"{line}; to start anyway, add --accept {DISK_KEY}")
        return [line]
    keys = [f"run.keep_last (now {run.keep_last})", f"run.keep_every (now {run.keep_every})"]
    keys += [f"run.snapshot_every (now {run.snapshot_every})"] if run.snapshot_every else []
    return [
        f"the checkpoints will take up to {size(needed)}, but the disk of run.dir has {free} free; change "
        f"{', '.join(keys)} or run.checkpoint_every (now {run.checkpoint_every}), or {remedy}"
    ]


def _saved_bytes(planned: Plan) -> int:
    """Return the planned bytes of checkpoints and snapshots; moments in files may be on another disk."""
    return sum(part.num_bytes for part in planned.parts if part.location == "disk" and part.name != "moments")


def _with_one_checkpoint(config: Config) -> Config:
    """Return the settings of a run that saves only its last step."""
    run = config.run.model_copy(update={"checkpoint_every": 0, "keep_every": 0, "snapshot_every": 0})
    return config.model_copy(update={"run": run, "evaluation": config.evaluation.model_copy(update={"best": None})})
