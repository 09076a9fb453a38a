"""Backbones on disk: description and format of an export, and reading weights of any format tensor by tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shards.format.files import read_json
from streamtrain.checkpoint import reader as checkpoint
from streamtrain.config.model import ModelConfig
from streamtrain.config.section import Positive, Section
from streamtrain.errors import StreamtrainError
from streamtrain.model.vit import VisionTransformer

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
# settings of the run, next to the weights exported from it
RECIPE_NAME = "recipe.yaml"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# keys under which trainers store the weights in a torch file
_WRAPPERS = ("teacher", "model", "state_dict", "model_state_dict")

Origin = dict[str, str | int | float | None]


class BackboneConfig(Section):
    """Description of a backbone: everything needed to use its weights.

    ``image_size`` is the side in pixels of the global crops in training; any multiple of the patch size works.
    ``mean`` and ``std`` are per channel, for pixels in 0..1. ``background`` is the colour behind transparent images
    (None: their alpha channel is dropped). ``origin`` is the provenance of the weights.
    """

    model: ModelConfig
    image_size: Positive
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    background: tuple[int, int, int] | None = (255, 255, 255)
    origin: Origin = Field(default_factory=dict)


def export_safetensors(model: VisionTransformer, config: BackboneConfig, out: Path) -> None:
    """Write ``out``/model.safetensors, with the config in its header too, and ``out``/config.json."""
    text = config.model_dump_json(indent=1)
    # "format" is a convention of the Hugging Face ecosystem
    header = {"format": "pt", "streamtrain": json.dumps(json.loads(text))}
    write_folder(out, text, model.state_dict(), header)


def write_folder(out: Path, config_text: str, state: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Write config.json, then model.safetensors; the weights file appears last and complete."""
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG_NAME).write_text(config_text + "\n", encoding="utf-8")
    partial = out / f".{WEIGHTS_NAME}.partial"
    save_file({name: value.contiguous() for name, value in state.items()}, partial, metadata=header)
    os.replace(partial, out / WEIGHTS_NAME)


def check_one_norm(config: BackboneConfig, family: str) -> None:
    """Raise StreamtrainError if CLS and registers have their own final norm, which ``family`` does not support."""
    if config.model.cls_norm:
        raise StreamtrainError(
            f"{family}'s DINOv3 models have one final norm, but this one has another for CLS and registers "
            f"(model.untied_norms={config.model.untied_norms}); export it with --to safetensors"
        )


@dataclass(frozen=True)
class StateFile:
    """Names and shapes of the tensors on disk, and a function that reads one."""

    shapes: Mapping[str, torch.Size]
    read: Callable[[str], Tensor]

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and tensors, one read at a time."""
        return ((name, self.read(name)) for name in self.shapes)


@contextmanager
def open_state(path: Path) -> Iterator[StateFile]:
    """Open a run directory or a checkpoint (its teacher), a folder with safetensors, or a weights file.

    Raises:
        StreamtrainError: if it is none of these, or cannot be read.
    """
    with ExitStack() as stack:
        try:
            yield _open(path, stack)
        except (OSError, SafetensorError, UnpicklingError, KeyError, RuntimeError) as error:
            raise StreamtrainError(f"the weights {path} cannot be read: {' '.join(str(error).split())}") from None


def _open(path: Path, stack: ExitStack) -> StateFile:
    if path.is_dir():
        steps = checkpoint.saved_steps(path)
        if steps or (path / checkpoint.STATE_NAME).is_file():
            folder = checkpoint.step_folder(path, steps[-1]) if steps else path
            reader = stack.enter_context(checkpoint.open_checkpoint(folder))
            shapes = {name: torch.Size(shape) for name, shape in reader.state["shapes"].items()}
            return StateFile(shapes, lambda name: reader.read_full(f"ema/{name}"))
        if (path / INDEX_NAME).is_file():
            try:
                names = read_json(path / INDEX_NAME)["weight_map"].values()
            except (ValueError, TypeError, AttributeError) as error:
                raise StreamtrainError(f"{path / INDEX_NAME} cannot be read: {error}") from None
            return _open_safetensors([path / name for name in sorted(set(names))], stack)
        path = path / WEIGHTS_NAME
        if not path.is_file():
            raise StreamtrainError(f"{path.parent} is neither a run with a checkpoint nor a folder with {WEIGHTS_NAME}")
    return _open_safetensors([path], stack) if path.suffix == ".safetensors" else _open_torch(path)


def _open_safetensors(paths: list[Path], stack: ExitStack) -> StateFile:
    files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
    file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dict
    shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name, file in file_of.items()}
    return StateFile(shapes, lambda name: file_of[name].get_tensor(name))


def _open_torch(path: Path) -> StateFile:
    with open(path, "rb") as file:
        # only the current zip format of torch can be memory-mapped
        can_map = file.read(2) == b"PK"
    state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
    while isinstance(state, dict) and (inner := next((key for key in _WRAPPERS if key in state), None)):
        state = state[inner]
    if not isinstance(state, dict):
        raise StreamtrainError(f"{path} contains a {type(state).__name__}, not tensors by name")
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return StateFile({name: value.shape for name, value in tensors.items()}, tensors.__getitem__)
