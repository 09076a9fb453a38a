"""TensorBoard: the event file of a run, the layout of its page of custom scalars, and reading images back.

torch and TensorBoard are imported where they are used, because checking a configuration needs neither.
"""

from __future__ import annotations

import io
import itertools
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from shards.credentials import strip_values
from shards.errors import printable
from shards.format.append_log import AppendLog
from streamtrain.config.recipes import leaves, nearest_recipe
from streamtrain.config.tree import Config
from streamtrain.reporting.projector import write_features
from streamtrain.run.tags import describe_tag

# charts of the "custom scalars" page, each given by patterns of tags
LAYOUT = {
    "learning": {
        "losses": ["Multiline", ["loss/.*"]],
        "evaluation": ["Multiline", ["eval/(knn|linear|patch).*"]],
        "collapse: rank, spread and entropy": ["Multiline", ["features/.*", "teacher/(entropy|prototype).*"]],
        "gradient norm": ["Multiline", ["optim/gradient_norm.*"]],
    },
    "schedules": {
        "learning rate": ["Multiline", ["optim/lr"]],
        "weight decay": ["Multiline", ["optim/weight_decay"]],
        "momentum of the teacher": ["Multiline", ["teacher/momentum"]],
        "temperature of the teacher": ["Multiline", ["teacher/temperature"]],
    },
    "machine": {
        "images a second": ["Multiline", ["speed/images_per_second"]],
        "seconds of a step": ["Multiline", ["speed/step_seconds.*"]],
        "model FLOPs utilisation": ["Multiline", ["speed/mfu"]],
        "shares of the time: data, monitoring, evaluation": [
            "Multiline", ["data/wait_share", "speed/monitor_share", "eval/time_share"],
        ],
        "memory": ["Multiline", ["memory/.*"]],
    },
}  # fmt: skip
# metrics in the table that compares runs
OUTCOMES = ("loss/total", "eval/knn_20", "speed/images_per_second")
# settings in that table for every run
_ALWAYS = ("data.micro_batch", "data.shards", "model.depth", "model.dim", "run.seed", "run.steps", "schedules.lr.peak")
# texts read back, the latest ones
_MAX_TEXTS = 100
# of the event files of this process
_NUMBERS = itertools.count()
# the bins of SummaryWriter: 10 % wide, from 1e-12 to 1e20
_POSITIVE_BINS = (1e-12 * 1.1 ** np.arange(774)).tolist()
_HISTOGRAM_BINS = [*(-limit for limit in reversed(_POSITIVE_BINS)), 0, *_POSITIVE_BINS]


class EventWriter:
    """Writes one event file to ``folder``; TensorBoard hides the steps an earlier start logged after ``start_step``.

    torch's ``SummaryWriter`` would write in a thread that a full disk ends, with the events of ten seconds. Here,
    events that cannot be written wait in memory.
    """

    def __init__(self, folder: Path, start_step: int, config: Config) -> None:
        _use_tensorflow_stub()
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from torch.utils.tensorboard import summary

        self._folder, self._summary, self._event = folder, summary, Event
        # TensorBoard reads the files of a folder in the order of their names
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        self._log = AppendLog(folder / name, prepare=partial(folder.mkdir, exist_ok=True))
        # a new run hides step 0 of an earlier start, too
        first = start_step + 1 if start_step else 0
        start = SessionLog(status=SessionLog.START)
        self._write(
            Event(wall_time=time.time(), file_version="brain.Event:2"),
            Event(wall_time=time.time(), step=first, session_log=start),
        )
        layout = summary.custom_scalars(LAYOUT)
        # SummaryWriter.add_hparams would write to a second folder
        self._add(0, layout, *summary.hparams(hyperparameters(config), dict.fromkeys(OUTCOMES)))
        self._described: set[str] = set()

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._add(step, *(each for tag, value in scalars.items() for each in self._scalar_summaries(tag, value)))

    def image(self, tag: str, step: int, image: np.ndarray) -> None:
        self._add(step, self._summary.image(tag, image, dataformats="HWC"))

    def histogram(self, tag: str, step: int, values: np.ndarray) -> None:
        self._add(step, self._summary.histogram(tag, values, _HISTOGRAM_BINS))

    def text(self, tag: str, text: str, step: int = 0) -> None:
        self._add(step, self._summary.text(tag, text))

    def embedding(self, step: int, features: np.ndarray, labels: Sequence[str], thumbnails: np.ndarray) -> None:
        write_features(self._folder, step, features, labels, thumbnails)

    def close(self) -> None:
        self._log.close()

    def _scalar_summaries(self, tag: str, value: float) -> Iterator[Any]:
        """Yield the summary of a value; at the first value of a tag, preceded by one with its description and unit.

        TensorBoard's fast reader takes descriptions from values of the newer kind only, while programs that use
        ``EventAccumulator.Scalars`` read only the older kind. Of two values of one step the page shows the later one.
        """
        if tag not in self._described:
            self._described.add(tag)
            described = self._summary.scalar(tag, value, new_style=True)
            described.value[0].metadata.summary_description = describe_tag(tag).text
            yield described
        yield self._summary.scalar(tag, value)

    def _add(self, step: int, *summaries: Any) -> None:
        now = time.time()
        self._write(*(self._event(wall_time=now, step=step, summary=summary) for summary in summaries))

    def _write(self, *events: Any) -> None:
        """Append the events in one write."""
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        content = io.BytesIO()
        records = RecordWriter(content)
        for event in events:
            records.write(event.SerializeToString())
        self._log.append(content.getvalue())


@dataclass(frozen=True)
class Logged:
    """Pictures, warnings and times from the event files of a run.

    Attributes:
        images: step and PNG of the latest image by tag.
        warnings: step and text of the latest warnings, oldest first.
        began, ended: time of the first and the last event, in seconds since 1970; None if there are none.
    """

    images: Mapping[str, tuple[int, bytes]] = field(default_factory=dict)
    warnings: Sequence[tuple[int, str]] = ()
    began: float | None = None
    ended: float | None = None


def read_logged(folder: Path) -> Logged:
    """Read a folder of event files; a missing folder is empty. TensorBoard raises almost anything for damaged files."""
    if not folder.is_dir():
        return Logged()
    _use_tensorflow_stub()
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    kept = {"images": 1, "scalars": 1, "histograms": 1, "tensors": _MAX_TEXTS}
    events = EventAccumulator(str(folder), size_guidance=kept)
    events.Reload()
    images = {tag: events.Images(tag)[-1] for tag in events.Tags()["images"]}
    tag = "warnings/text_summary"
    texts = events.Tensors(tag) if tag in events.Tags()["tensors"] else []
    latest = [event.wall_time for scalar in events.Tags()["scalars"] for event in events.Scalars(scalar)]
    return Logged(
        {tag: (image.step, image.encoded_image_string) for tag, image in images.items()},
        [
            (text.step, line.decode(errors="replace"))
            for text in sorted(texts, key=lambda event: event.step)
            for line in text.tensor_proto.string_val[:1]
        ],
        events.FirstEventTimestamp() if images or texts or latest else None,
        max(latest, default=None),
    )


def _use_tensorflow_stub() -> None:
    """Keep TensorBoard from importing TensorFlow, which takes seconds; it checks for this module."""
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))


def hyperparameters(config: Config) -> dict[str, bool | float | str]:
    """Return the nearest recipe, the settings in which the run differs from it, and a few that are always listed."""
    recipe, changed = nearest_recipe(config)
    return {"recipe": recipe, **_plain({key: v for key, v in leaves(config) if key in _ALWAYS or key in changed})}


def changed_hyperparameters(config: Config) -> dict[str, bool | float | str]:
    """Return all settings that differ from their defaults, and a few that are always listed."""
    defaults = dict(leaves(Config()))
    return _plain({key: v for key, v in leaves(config) if key in _ALWAYS or v != defaults[key]})


def _plain(settings: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """Return the settings that affect the result, as numbers and text."""
    return {
        key: value if isinstance(value, bool | int | float) else printable(value)
        for key, value in strip_values(dict(settings)).items()
        # reporting and output paths do not affect the result
        if value is not None and not key.startswith(("monitor.", "evaluation.", "run.dir"))
    }
