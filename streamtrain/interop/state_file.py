"""Somebody's weights on disk, opened for their names and shapes; each tensor is read when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shards.format.files import read_json
from streamtrain.checkpoint import reader as checkpoint
from streamtrain.errors import StreamtrainError
from streamtrain.interop.folder import WEIGHTS_NAME

INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
# under which trainers keep the weights within a torch file
_WRAPPERS = ("teacher", "model", "state_dict", "model_state_dict")


@dataclass(frozen=True)
class StateFile:
    """Names and shapes of what is there, and how to read one tensor."""

    shapes: Mapping[str, torch.Size]
    read: Callable[[str], Tensor]


@contextmanager
def opened_state(path: Path) -> Iterator[StateFile]:
    """Open a run folder or a checkpoint within it (the teacher), a folder with safetensors, or a weights file.

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
            return _safetensors([path / name for name in sorted(set(names))], stack)
        path = path / WEIGHTS_NAME
        if not path.is_file():
            raise StreamtrainError(f"{path.parent} is no run with a checkpoint and no folder with {WEIGHTS_NAME}")
    return _safetensors([path], stack) if path.suffix == ".safetensors" else _torch_file(path)


def _safetensors(paths: list[Path], stack: ExitStack) -> StateFile:
    files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
    place = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dict
    shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name, file in place.items()}
    return StateFile(shapes, lambda name: place[name].get_tensor(name))


def _torch_file(path: Path) -> StateFile:
    state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_map(path))
    while isinstance(state, dict) and (inner := next((key for key in _WRAPPERS if key in state), None)):
        state = state[inner]
    if not isinstance(state, dict):
        raise StreamtrainError(f"{path} holds a {type(state).__name__}, not tensors by name")
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return StateFile({name: value.shape for name, value in tensors.items()}, tensors.__getitem__)


def _can_map(path: Path) -> bool:
    """Whether the file is of torch's present format, which need not be read as a whole."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"
