"""TensorBoard: the event file of a run, the layout of its page of custom scalars, and reading images back.

torch and TensorBoard are imported where they are used, because checking a configuration needs neither.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from pydantic import BaseModel

from shards.credentials import strip_from_text
from streamtrain.config.tree import Config
from streamtrain.reporting.projector import write_features

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


class EventWriter:
    """Writes one event file to ``folder``; TensorBoard hides the steps an earlier start logged after ``start_step``."""

    def __init__(self, folder: Path, start_step: int, config: Config) -> None:
        _use_tensorflow_stub()
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._folder = folder
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1, flush_secs=10)
        self._writer.add_custom_scalars(LAYOUT)
        # SummaryWriter.add_hparams would write to a second folder
        file_writer = self._writer._get_file_writer()
        for summary in hparams(hyperparameters(config), dict.fromkeys(OUTCOMES)):
            file_writer.add_summary(summary)

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)

    def image(self, tag: str, step: int, image: np.ndarray) -> None:
        self._writer.add_image(tag, image, step, dataformats="HWC")

    def histogram(self, tag: str, step: int, values: np.ndarray) -> None:
        self._writer.add_histogram(tag, values, step)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        self._writer.add_text(tag, text, step)

    def embedding(self, step: int, features: np.ndarray, labels: Sequence[str], thumbnails: np.ndarray) -> None:
        write_features(self._folder, step, features, labels, thumbnails)

    def close(self) -> None:
        self._writer.close()


def latest_images(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return step and PNG of the latest image by tag, from a folder of event files."""
    if not folder.is_dir():
        return {}
    _use_tensorflow_stub()
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    events = EventAccumulator(str(folder), size_guidance={"images": 1, "scalars": 1, "histograms": 1, "tensors": 1})
    events.Reload()
    images = {tag: events.Images(tag)[-1] for tag in events.Tags()["images"]}
    return {tag: (image.step, image.encoded_image_string) for tag, image in images.items()}


def _use_tensorflow_stub() -> None:
    """Keep TensorBoard from importing TensorFlow, which takes seconds; it checks for this module."""
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))


def hyperparameters(config: Config) -> dict[str, bool | float | str]:
    """Return the settings that differ from their defaults, and a few that are always listed."""
    defaults = dict(_leaves(Config(), ""))
    always = ("data.micro_batch", "model.depth", "model.dim", "run.seed", "run.steps", "schedules.lr.peak")
    values: dict[str, bool | float | str] = {}
    for key, value in _leaves(config, ""):
        # reporting and output paths do not affect the result
        if key.startswith(("monitor.", "evaluation.", "run.dir")) or value is None:
            continue
        if key in always or value != defaults[key]:
            values[key] = value if isinstance(value, bool | int | float) else strip_from_text(str(value))
    return values


def _leaves(section: BaseModel, prefix: str) -> Iterator[tuple[str, Any]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
