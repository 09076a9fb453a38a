"""Whether a start goes on with the run that a checkpoint is of, or would quietly turn it into another one.

A checkpoint says itself what made it: whatever a start writes before its own first one binds nobody.

Three kinds of keys, listed in docs/reliability.md as well: those that may change, since no result depends on them
beyond rounding and the run's length; those that may not, since the checkpoint or the stream would be another; and all
others, which change results, and may change only when that is asked for. Free of torch.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from streamtrain.config.load import parse_yaml, to_yaml
from streamtrain.config.tree import Config
from streamtrain.errors import CheckpointError
from streamtrain.run.provenance import program

FREE = (
    "run.dir", "run.steps", "run.checkpoint_every", "run.keep_last", "run.keep_every", "run.snapshot_every",
    "run.save_in_background", "run.max_bad_steps", "data.shards", "data.micro_batch", "data.max_unusable_share",
    "data.reader_threads", "data.decode_threads", "data.prefetch", "data.read_ahead_bytes", "data.cache", "data.remote",
    "model.preset", "objective.chunk_bytes", "teacher.chunk", "teacher.average", "engine.device",
    "engine.checkpointing", "engine.compile", "engine.view_groups", "engine.offload_checkpoints", "engine.moments",
    "engine.moments_ratio", "engine.moments_dir", "engine.live_blocks", "engine.reduce_bucket_bytes",
    "engine.cpu_threads", "engine.cpu_kernels", "engine.collective_timeout_seconds", "engine.hang_timeout_seconds",
    "init.weights", "init.minimum_matched", "monitor", "evaluation",
)  # fmt: skip
FIXED = (
    "run.seed", "data.window", "data.lanes", "model.patch_size", "model.dim", "model.depth", "model.num_heads",
    "model.mlp", "model.mlp_hidden", "model.num_registers", "model.qkv_bias", "model.key_bias", "model.untied_norms",
    "objective.global_loss.head", "objective.patch_loss.head", "objective.patch_loss.kind",
)  # fmt: skip
FLAG = "--accept-changes"
_MISSING = "not there"


def made_by(config: Config, dtype: str) -> dict[str, Any]:
    """What a checkpoint keeps of what made it: the resolved ``config``, the ``program``, and in what it computed."""
    return {"config": _plain(config), "program": program(), "dtype": dtype}


def check_resume(
    config: Config, source: Path, saved: Mapping[str, Any], world_size: int, accept_changes: bool,
    dtype: str | None = None,
) -> list[str]:  # fmt: skip
    """Whether ``config`` may go on from a checkpoint; returns the changes that were accepted, as text.

    Another run's checkpoint (``--resume``) begins a new stage, whose settings are meant to differ; of them only those
    that may never change are compared.

    Args:
        source: the checkpoint.
        saved: what it says of itself (``saved_state``).
        world_size: ranks of this start.
        dtype: what this start computes in, which ``auto`` leaves to the machine; None: not known yet.

    Raises:
        CheckpointError: it may not; names each difference.
    """
    run_dir = source.parent.parent
    own = run_dir.resolve() == Path(config.run.dir).resolve()
    before, was = saved.get("config"), saved.get("program")
    changes = list(_differences(before, _plain(config))) if isinstance(before, dict) else []
    # a key that is of another version of this program is for the user to judge
    never = [text for key, text in changes if _among(key, FIXED) and _MISSING not in text]
    if never:
        raise CheckpointError(
            f"{run_dir} cannot go on with other values of {'; '.join(never)}; use those of the run, or set run.dir to "
            "a new folder"
        )
    if not own:
        return []
    found = [text for key, text in changes if not _among(key, FREE) and key != "data.global_batch"]
    if isinstance(before, dict):
        found += _batch_change(config, before, saved.get("world_size"), world_size)
    else:
        found.append(f"{source.name} does not say with which settings")
    if isinstance(was, dict):
        found += [text for _, text in _differences(was, program())]
    else:
        found.append(f"{source.name} does not say by which program")
    if dtype is not None and saved.get("dtype", dtype) != dtype:
        kept = _shown(saved["dtype"])
        found.append(f"it computed in {kept}, and this machine would in {dtype} (engine.dtype={kept} keeps it)")
    if found and not accept_changes:
        raise CheckpointError(
            f"{run_dir} was made otherwise: {'; '.join(found)}; start it as it was, or add {FLAG} to go on all the same"
        )
    return found


def _plain(config: Config) -> dict[str, Any]:
    """The tree as files hold it."""
    return dict(parse_yaml(to_yaml(config).encode()))


def _batch_change(config: Config, before: Mapping[str, Any], ranks: object, world_size: int) -> list[str]:
    """The images of a step follow from three numbers."""
    data = before.get("data")
    if not isinstance(data, dict) or not isinstance(ranks, int) or not isinstance(data.get("micro_batch"), int):
        return [f"the batch was {_MISSING}"]
    was, now = data.get("global_batch") or data["micro_batch"] * ranks, config.batch_split(world_size)[0]
    if was == now:
        return []
    return [f"the batch was {was} images and is now {now} (data.global_batch={was} keeps it)"]


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each key that differs, in full, and what to say of it."""
    for name in sorted({*map(str, before), *now}):
        key, was, value = prefix + name, before.get(name, _MISSING), now.get(name, _MISSING)
        if isinstance(was, dict) and isinstance(value, dict):
            yield from _differences(was, value, f"{key}.")
        elif was != value:
            yield key, f"{key} was {_shown(was)} and is now {_shown(value)}"


def _shown(value: Any) -> str:
    """As in the file, where that is short."""
    return value if isinstance(value, str) and len(value) < 80 else reprlib.repr(value)


def _among(key: str, patterns: tuple[str, ...]) -> bool:
    return any(key == pattern or key.startswith(f"{pattern}.") for pattern in patterns)
