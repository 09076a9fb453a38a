"""Comparison of the current settings with the checkpoint to resume. Torch-free.

A checkpoint records its settings, versions and data type. By the resume rule of a setting (see
``streamtrain.config.section.setting``), its value may change (``free``), may change if the user names its key after
``--accept`` (``accept``), or may not change (``fixed``). Different versions of the code or the libraries only cause a
warning.
"""

from __future__ import annotations

import argparse
import logging
import reprlib
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from shards.credentials import strip_values
from shards.errors import ShardError
from shards.storage.paths import expand_path
from streamtrain.config.load import known_keys, merge, parse_yaml, to_yaml, unknown_key_message
from streamtrain.config.schedules import Schedule
from streamtrain.config.section import ACCEPT_ALL, is_accepted
from streamtrain.config.tree import Config, path_settings, resume_rules, setting_key
from streamtrain.config.user_code import code_digest
from streamtrain.errors import CheckpointError, ConfigError
from streamtrain.run.provenance import program_versions

logger = logging.getLogger(__name__)

# key that accepts a checkpoint without recorded settings
CONFIG_KEY = "config"
# keys that accept a start for which this machine has too little memory or disk space
MEMORY_KEY, DISK_KEY = "memory", "disk"
# settings compared by their effect: the digest of the images, the batch, the data type in use
_COMPARED_BY_EFFECT = ("data.shards", "data.global_batch", "engine.dtype")
_MISSING = "missing"
# the longest keys, such as objective.gram.refresh.first, have fewer parts; a damaged checkpoint may be nested deeper
_MAX_PARTS = 5


class Change(NamedTuple):
    """A setting that differs from the checkpoint's."""

    key: str
    text: str

    @property
    def setting(self) -> str:
        """The setting that ``key`` is, or is part of."""
        return setting_key(self.key) or self.key


def build_provenance(config: Config, dtype: str) -> dict[str, Any]:
    """Return a checkpoint's provenance: resolved settings, versions and data type."""
    return {"config": _to_plain(config), "program": program_versions() | _user_code(config), "dtype": dtype}


def add_accept_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that accept changed settings."""
    parser.add_argument(
        "--accept", nargs="+", action="extend", default=[], metavar="KEY",
        help="resume although these settings differ from the checkpoint, such as --accept schedules.lr optim.clip. "
        f"With {MEMORY_KEY} or {DISK_KEY}: start although this machine has too little of it",
    )  # fmt: skip
    # deprecated: accepts every setting that is not fixed
    parser.add_argument("--accept-changes", action="store_true", help=argparse.SUPPRESS)


def separate_overrides(arguments: argparse.Namespace) -> None:
    """Move overrides after ``--accept KEY``, which argparse parses as keys, to ``arguments.overrides``."""
    words = arguments.overrides + [word for word in arguments.accept if "=" in word]
    # the last override of a key wins, so their order matters; of repeated words the last one counts
    positions = {word: index for index, word in enumerate(sys.argv)}
    arguments.overrides = sorted(words, key=lambda word: positions.get(word, len(sys.argv)))
    arguments.accept = [word for word in arguments.accept if "=" not in word]


def accepted_keys(arguments: argparse.Namespace, rank: int) -> frozenset[str]:
    """Return the keys of the settings that may differ from the checkpoint's; errors as in ``parse_accepted``."""
    accepted = parse_accepted(arguments.accept)
    if not arguments.accept_changes:
        return accepted
    if rank == 0:
        logger.warning("--accept-changes is deprecated; use --accept KEY [KEY ...] with the keys of the changes")
    return accepted | {ACCEPT_ALL}


def parse_accepted(values: Iterable[str]) -> frozenset[str]:
    """Return the keys of ``--accept``, given one by one or joined by commas.

    Raises:
        ConfigError: a key is unknown, a whole section, or fixed.
    """
    keys = frozenset(key for value in values for key in value.split(",") if key)
    for key in sorted(keys - {CONFIG_KEY, MEMORY_KEY, DISK_KEY}):
        setting = setting_key(key)
        if key not in known_keys():
            raise ConfigError(f"--accept: {unknown_key_message(key)}")
        if setting is None:
            raise ConfigError(f"--accept {key}: this is a section; give the keys of the changed settings")
        if resume_rules()[setting] == "fixed":
            raise ConfigError(f"--accept {key}: this setting is fixed for a run; set run.dir to a new directory")
    return keys


def check_resume(
    config: Config, source: Path, saved: Mapping[str, Any], world_size: int, accepted: Collection[str] = (),
    dtype: str | None = None,
) -> list[str]:  # fmt: skip
    """Check that ``config`` may resume a checkpoint; return the accepted changes as text.

    Starting from another run's checkpoint (``--resume``) begins a new stage: only ``fixed`` settings are compared.

    Args:
        source: folder of the checkpoint.
        saved: its ``state.json``.
        accepted: keys of settings that may differ; ``*``: all that are not fixed.
        dtype: current data type; None if not known yet (``engine.dtype`` is ``auto``).

    Raises:
        CheckpointError: it may not; the message names each change and the option that accepts it.
    """
    run_dir = source.parent.parent
    is_own = run_dir.resolve() == Path(config.run.dir).resolve()
    changes = list(_changes(config, source, saved, world_size, dtype))
    rules = resume_rules()
    if fixed := [change.text for change in changes if rules.get(change.setting) == "fixed"]:
        remedy = "set run.dir to a new directory" if is_own else "start without --resume"
        raise CheckpointError(
            f"fixed settings differ from checkpoint {source}: {'; '.join(fixed)}; restore them, or {remedy}"
        )
    if not is_own:
        return []
    changes = [change for change in changes if rules.get(change.setting) != "free"]
    refused = [
        change for change in changes if not any(is_accepted(key, accepted) for key in (change.key, change.setting))
    ]
    if refused:
        keys = dict.fromkeys(change.setting for change in refused)
        raise CheckpointError(
            f"settings differ from checkpoint {source}: {'; '.join(change.text for change in refused)}; restore them, "
            f"or add --accept {' '.join(keys)}"
        )
    return [change.text for change in changes]


def recorded_constants(config: Config, saved: Mapping[str, Any], reshaped: Iterable[str]) -> list[str]:
    """Return overrides that keep the constants of a run that was started when a number did not keep a recipe's shape.

    Args:
        saved: the ``state.json`` of the run's checkpoint.
        reshaped: schedules whose peak was given as a number.
    """
    recorded, current = dict(_flatten(saved.get("config"))), dict(_flatten(_to_plain(config)))
    overrides = []
    for key in sorted(reshaped):
        constant = Schedule(peak=current[f"{key}.peak"]).model_dump()
        shape = {name: value for name, value in constant.items() if name != "peak"}
        if all(recorded.get(f"{key}.{name}", _MISSING) == value for name, value in shape.items()):
            overrides += [f"{key}.{name}={'null' if value is None else value}" for name, value in constant.items()]
    return overrides


def with_recorded_teacher(config: Config, saved: Mapping[str, Any]) -> Config:
    """Return ``config`` with ``teacher.model`` of the checkpoint with ``state.json``, unless it is set."""
    recorded = saved.get("config")
    teacher = recorded.get("teacher") if isinstance(recorded, dict) else None
    model = teacher.get("model") if isinstance(teacher, dict) else None
    if config.teacher.model is not None or not isinstance(model, dict):
        return config
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"model": model})})


def has_same_shards(config: Config, saved: Mapping[str, Any]) -> bool:
    """Return whether ``data.shards`` names the same sets as when the checkpoint with ``state.json`` was saved."""
    recorded = saved.get("config")
    before = dict(_flatten(recorded)).get("data.shards", _MISSING)
    return bool(before == dict(_flatten(_to_plain(config))).get("data.shards"))


def version_changes(config: Config, source: Path, saved: Mapping[str, Any]) -> list[str]:
    """Return changes of code, libraries and known keys since the run's own checkpoint, as text."""
    if source.parent.parent.resolve() != Path(config.run.dir).resolve():
        return []
    before, current = saved.get("program"), program_versions() | _user_code(config)
    if not isinstance(before, dict):
        return [f"{source.name} does not record its versions"]
    names = sorted({*map(str, before), *current})
    texts = [_describe(name, current.get(name, _MISSING), before.get(name, _MISSING)) for name in names
             if before.get(name, _MISSING) != current.get(name, _MISSING)]  # fmt: skip
    unknown = [key for key, _ in _flatten(saved.get("config")) if setting_key(key) is None]
    return texts + [f"the checkpoint has a setting {reprlib.repr(key)} that no longer exists" for key in unknown]


def _user_code(config: Config) -> dict[str, str]:
    """Return digests of the user's own code that settings name."""
    references = [each for each in (config.data.augmentations, config.model.factory) if each is not None]
    return {f"code of {each.partition(':')[0]}": code_digest(each) or _MISSING for each in references}


def _changes(
    config: Config, source: Path, saved: Mapping[str, Any], world_size: int, dtype: str | None
) -> Iterator[Change]:
    """Yield every setting that differs; a key that the checkpoint lacks counts as its default."""
    recorded, before = saved.get("config"), dict[str, Any]()
    if not isinstance(recorded, dict):
        yield Change(CONFIG_KEY, f"{source.name} does not record its settings")
    else:
        # older checkpoints record URLs with their credentials
        defaults = _to_plain(Config())
        before, current = (
            dict(_flatten(_with_teacher_defaults(merge(defaults, each), defaults)))
            for each in (strip_values(recorded), _to_plain(config))
        )
        for key in sorted({*before, *current}):
            was, now = _expand(key, before.get(key, _MISSING)), current.get(key, _MISSING)
            if was != now and setting_key(key) not in (None, *_COMPARED_BY_EFFECT):
                yield Change(key, _describe(key, now, was))
        yield from _batch_change(config, recorded, saved.get("world_size"), world_size)
    dtype = config.engine.dtype if config.engine.dtype != "auto" else dtype
    # older checkpoints do not record the data type that auto selected
    was = saved.get("dtype", before.get("engine.dtype", "auto"))
    if dtype is not None and was not in (dtype, "auto"):
        yield Change("engine.dtype", f"{_describe('the data type', dtype, was)} (engine.dtype={_show(was)} keeps it)")


def _with_teacher_defaults(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return plain settings with the defaults of all keys that a feature teacher's model section lacks."""
    teacher = settings["teacher"]
    if not isinstance(teacher, dict) or not isinstance(teacher.get("model"), dict):
        return settings
    return settings | {"teacher": teacher | {"model": merge(defaults["model"], teacher["model"])}}


def _expand(key: str, value: Any) -> Any:
    """Return a recorded value as it is now read: older checkpoints record paths with ``~``."""
    if key in path_settings() and isinstance(value, str):
        with suppress(ShardError):
            return expand_path(value)
    return value


def _batch_change(config: Config, recorded: Mapping[str, Any], ranks: object, world_size: int) -> Iterator[Change]:
    """Yield a change of the global batch, which follows from two settings and the number of ranks."""
    data = recorded.get("data")
    if not isinstance(data, dict) or not isinstance(ranks, int) or not isinstance(data.get("micro_batch"), int):
        yield Change("data.global_batch", "the checkpoint does not record its batch")
        return
    was, now = data.get("global_batch") or data["micro_batch"] * ranks, config.batch_split(world_size)[0]
    if was != now:
        text = f"{_describe('the batch', now, was)} images (data.global_batch={_show(was)} keeps it)"
        yield Change("data.global_batch", text)


def _to_plain(config: Config) -> dict[str, Any]:
    """Return the settings with the types that YAML files have."""
    return dict(parse_yaml(to_yaml(config).encode()))


def _flatten(values: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of every leaf of nested mappings."""
    for name, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, dict) and prefix.count(".") < _MAX_PARTS:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _describe(name: str, now: Any, was: Any) -> str:
    return f"{name} is {_show(now)}, the checkpoint has {_show(was)}"


def _show(value: Any) -> str:
    """Return a short string unchanged, and any other value abbreviated."""
    return value if isinstance(value, str) and len(value) < 80 else reprlib.repr(value)
