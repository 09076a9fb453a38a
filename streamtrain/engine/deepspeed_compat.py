"""The only module that uses DeepSpeed's private names, each with its reason.

A DeepSpeed release may rename any of them. An unsupported version or a missing name raises a one-line ConfigError
before the first step. ``tests/engine/test_deepspeed_compat.py`` trains with the oldest and newest supported version.

DeepSpeed is imported where it is used, because it chooses its accelerator at import.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor
from torch.nn import Parameter

from streamtrain.errors import ConfigError

SUPPORTED = ">=0.19,<0.20"
# attributes of the student's ZeRO-3 optimiser that ``Stage3Optimizer`` reads or replaces
_STAGE3_NAMES = (
    "fp16_groups", "fp16_partitioned_groups_flat", "fp32_partitioned_groups_flat", "grad_partitions_flat_buffer",
    "averaged_gradients", "clip_grad", "grad_position", "get_param_id", "_get_norm_groups",
    "_prepare_fp32_grad_for_sub_group", "unscale_and_clip_grads", "parameter_offload",
    "reduce_independent_p_g_buckets_and_remove_grads", "reduce_and_partition_stream",
)  # fmt: skip
_PARAMETER_NAMES = ("ds_shape", "ds_numel", "ds_tensor", "ds_status", "ds_persist", "partition_numel")


def unsupported(reason: str) -> ConfigError:
    import deepspeed

    return ConfigError(f"DeepSpeed {deepspeed.__version__} is not supported: {reason}; install deepspeed{SUPPORTED}")


def _require(label: str, owner: object, *names: str) -> None:
    for name in names:
        if not hasattr(owner, name):
            raise unsupported(f"{label}.{name} is missing")


def check_version() -> None:
    """Check the version of DeepSpeed and the private names of its modules; raises ConfigError."""
    import deepspeed

    if deepspeed.__version__ not in SpecifierSet(SUPPORTED, prereleases=True):
        raise unsupported("streamtrain is not tested with this version")
    _require("ops", deepspeed.ops, "__compatible_ops__")
    _require("utils.groups", deepspeed.utils.groups, "_clone_world_group")


def check_parameter(parameter: Parameter) -> None:
    """Check the attributes that ``deepspeed.zero.Init`` gives to parameters; raises ConfigError."""
    _require("parameter", parameter, *_PARAMETER_NAMES)


def disable_shared_memory_all_reduce() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce for CPUs; gloo works without it.

    A process killed while compiling leaves a lock file behind, on which every later start would wait forever.
    """
    import deepspeed

    # DeepSpeed checks this table before it compiles an extension; there is no setting
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def cloned_world_group() -> torch.distributed.ProcessGroup:
    """Return the process group of DeepSpeed's own collectives, a clone of the world group."""
    import deepspeed

    # no public name; it is created with the default timeout
    return deepspeed.utils.groups._clone_world_group()


def full_shape(parameter: Parameter) -> torch.Size:
    """Return the shape of a parameter, partitioned or not."""
    # ``shape`` of a partitioned parameter is [0]
    return getattr(parameter, "ds_shape", parameter.shape)


def full_numel(parameter: Parameter) -> int:
    """Return the number of values of a partitioned parameter, whose ``numel()`` is 0."""
    return parameter.ds_numel


def shard_of(parameter: Parameter) -> Tensor:
    """Return ``[shard_numel]``: this rank's shard, which DeepSpeed gathers from."""
    # the public safe_get_local_fp32_param needs an optimiser, which a teacher does not have
    return parameter.ds_tensor


def shard_numel(parameter: Parameter) -> int:
    """Return the number of values of each rank's shard, with the padding that DeepSpeed chooses."""
    return parameter.partition_numel()


def is_gathered(parameter: Parameter) -> bool:
    """Return whether this rank holds the full parameter, or is gathering it; writes to its shard would be lost."""
    return parameter.ds_status.name != "NOT_AVAILABLE"


def is_persistent(parameter: Parameter) -> bool:
    """Return whether every rank keeps the full parameter, which then does not follow writes to its shard."""
    return parameter.ds_persist


def release_parameters(engine: Any) -> None:
    """Release every gathered parameter of an engine without optimiser, so that writes to shards take effect."""
    # the attribute ``optimizer`` of such an engine is DeepSpeed's parameter offload
    _require("parameter_offload", engine.optimizer, "partition_all_parameters")
    engine.optimizer.partition_all_parameters()


def let_host_run_ahead(parameter_offload: Any) -> None:
    """Let the host start gathers without waiting for earlier ones.

    DeepSpeed waits to limit gathered memory. Here gathers start on the compute stream, which frees and reuses memory in
    its own order, so the limit holds however far the host is ahead.
    """
    coordinator = parameter_offload.get_param_coordinator()
    name = "_PartitionedParameterCoordinator__ongoing_fetch_events"
    _require("param_coordinator", coordinator, name)
    # the events it would wait for; this queue stays empty
    setattr(coordinator, name, deque(maxlen=0))


def replace_gather_handles() -> None:
    """Keep the host from waiting for the GPU on a single rank, and free the buffer of a gather once it is read.

    DeepSpeed keeps the buffer until the last of its parameters is needed, often a block later.
    """
    from deepspeed.runtime.zero import partition_parameters as zero

    names = ("NoGatherHandle", "NoGatherCoalescedHandle", "AllGatherCoalescedHandle", "ZeroParamStatus")
    _require("partition_parameters", zero, *names)

    def mark_available(handle: Any, **_: Any) -> None:
        # an attribute of "class X" named "__y" is "_X__y"
        prefix, values = f"_{type(handle).__name__}__", vars(handle)
        if values[f"{prefix}complete"]:
            return
        values[f"{prefix}complete"] = True
        for parameter in values.get(f"{prefix}params") or [values[f"{prefix}param"]]:
            parameter.ds_status = zero.ZeroParamStatus.AVAILABLE

    if zero.NoGatherHandle.wait.__module__ == __name__:
        return  # already replaced by an earlier run in this process
    zero.NoGatherHandle.wait = zero.NoGatherCoalescedHandle.wait = mark_available
    wait = zero.AllGatherCoalescedHandle.wait

    def wait_and_free(handle: Any, **options: Any) -> None:
        wait(handle, **options)
        # both refer to the buffer
        handle.partitions, handle.allgather_handle = [], None

    zero.AllGatherCoalescedHandle.wait = wait_and_free


class Stage3Optimizer:
    """The ZeRO-3 optimiser that ``deepspeed.initialize`` returns for the student."""

    def __init__(self, optimizer: Any) -> None:
        """Check its attributes; raises ConfigError."""
        _require("stage3", optimizer, *_STAGE3_NAMES)
        let_host_run_ahead(optimizer.parameter_offload)
        self._stage3 = optimizer
        if (stream := optimizer.reduce_and_partition_stream) is not None:
            # DeepSpeed would block the host here for its reductions, which gradients.py replaces
            stream.synchronize = lambda: None

    @property
    def groups(self) -> list[list[Parameter]]:
        """The parameters of each flat tensor; ``flat_gradients`` has the same order."""
        return self._stage3.fp16_groups

    @property
    def flat_values(self) -> list[Tensor]:
        """The flat tensors of this rank's shards, in the network's dtype ("fp16" is any); in fp32 also the masters."""
        return self._stage3.fp16_partitioned_groups_flat

    @property
    def flat_masters(self) -> list[Tensor]:
        """The flat tensors of this rank's fp32 master shards, which EMA and checkpoints read without a copy."""
        return self._stage3.fp32_partitioned_groups_flat

    @property
    def flat_gradients(self) -> Tensor:
        """This rank's gradient shards, one flat tensor, in which engine/gradients.py accumulates and clips."""
        return self._stage3.grad_partitions_flat_buffer

    @property
    def clip_limit(self) -> float:
        """The largest gradient norm, for the replaced clipping; 0: no clipping."""
        return self._stage3.clip_grad

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the wrapped torch optimiser (a public name)."""
        return self._stage3.param_groups

    def position(self, parameter: Parameter) -> tuple[int, int, int]:
        """Return which flat tensor holds a parameter's shard, its offset and its size, from DeepSpeed's own table."""
        return self._stage3.grad_position[self._stage3.get_param_id(parameter)]

    def use_gradient(self, group: int, gradient: Tensor) -> None:
        """Let the coming update of flat tensor ``group`` read ``gradient``."""
        self.flat_masters[group].grad = gradient
        # the replaced method flattens this list into the gradient and then releases it
        self._stage3.averaged_gradients[group] = None

    def replace_gradient_path(
        self,
        *,
        store: Callable[[Parameter], None],
        norms: Callable[[], list[Tensor]],
        prepare: Callable[[int], None],
        clip: Callable[[int, Tensor], None],
    ) -> None:
        """Replace the methods that handle gradients between the backward pass and the update.

        Args:
            store: ``(parameter)``, called once its ``grad`` is complete, instead of reducing it.
            norms: returns the norm of the gradient over all ranks, in a list.
            prepare: ``(group)``, called before a flat tensor is updated.
            clip: ``(group, norm)``, called after ``prepare``.
        """
        # DeepSpeed has no hooks here
        self._stage3.reduce_independent_p_g_buckets_and_remove_grads = store
        self._stage3._get_norm_groups = norms
        self._stage3._prepare_fp32_grad_for_sub_group = prepare
        self._stage3.unscale_and_clip_grads = clip
