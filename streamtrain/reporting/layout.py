"""What belongs together in TensorBoard: charts of the custom-scalars page, and the hyperparameters of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from streamtrain.config.tree import Config

# Charts of the "custom scalars" page, each by patterns of tags.
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
# what TensorBoard's table of runs compares them by
OUTCOMES = ("loss/total", "eval/knn_20", "speed/images_per_second")


def hyperparameters(config: Config) -> dict[str, bool | float | str]:
    """The keys by which this run differs from the defaults, and what one always looks for."""
    defaults = dict(_leaves(Config(), ""))
    always = ("data.micro_batch", "model.depth", "model.dim", "run.seed", "run.steps", "schedules.lr.peak")
    found: dict[str, bool | float | str] = {}
    for key, value in _leaves(config, ""):
        # where it writes and what it shows makes no run another one
        if key.startswith(("monitor.", "evaluation.", "run.dir")) or value is None:
            continue
        if key in always or value != defaults[key]:
            found[key] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


def _leaves(section: BaseModel, prefix: str) -> Iterator[tuple[str, Any]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
