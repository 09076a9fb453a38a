"""Read tensors by name from untrusted weights: safetensors, torch files, folders of them, and checkpoints.

Nothing in a file runs code, and time and memory are bounded by its size. Every fault is one line.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shards.errors import ShardError
from shards.format.files import read_json
from streamtrain.checkpoint import reader as checkpoint
from streamtrain.config.model import is_adapter
from streamtrain.errors import StreamtrainError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
# nested containers of a torch file, and values in all of them
_MAX_DEPTH, _MAX_VALUES = 16, 1_000_000
# longer lists hold no tensors by name
_MAX_LIST = 1000
# Python classes other than tensors and containers that a torch file may refer to
_MAX_CLASSES = 100
# shared by all files of a folder: more than any published model has
_MAX_FILES = 1000
# names listed in messages, and characters of each
_NAMES_SHOWN, _NAME_LENGTH = 5, 60
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class StateFile:
    """Tensors on disk.

    Attributes:
        shapes: by the dotted name of each tensor, through all containers.
        contents: a description of each top-level value, for errors.
    """

    path: Path
    shapes: Mapping[str, torch.Size]
    contents: list[str]
    _read: Callable[[str], Tensor]

    def read(self, name: str) -> Tensor:
        """Return one tensor in fp32.

        Raises:
            StreamtrainError: if it cannot be read, or is not a dense tensor of real numbers on the CPU.
        """
        with readable(self.path):
            value = self._read(name)
            is_dense = value.layout == torch.strided and not value.is_quantized and value.device.type == "cpu"
            if not is_dense or not value.is_floating_point():
                kind = _describe_tensor(value)
                raise StreamtrainError(f"{self.path} has {name} as {kind}, not as a dense floating-point tensor")
            # an expanded tensor can have any number of elements in a file of any size
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise StreamtrainError(f"{self.path} has {name} with {value.numel()} elements, but fewer values")
            return value.detach().float()


@contextmanager
def open_state(path: Path) -> Iterator[StateFile]:
    """Open a run directory or a checkpoint, a folder with safetensors, or a weights file.

    The networks of a checkpoint are below ``teacher.`` and ``student.``, with LoRA adapters merged.

    Raises:
        StreamtrainError: if it is none of these, or cannot be read.
    """
    with ExitStack() as stack:
        with readable(path):
            state = _open(path, stack)
        yield state


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise StreamtrainError for any failure of the libraries that parse ``path`` in the ``with`` block."""
    try:
        yield
    except (StreamtrainError, ShardError):
        raise
    except OSError as error:
        raise StreamtrainError(f"the weights {path} cannot be read: {error.strerror or error}") from None
    except MemoryError:
        raise StreamtrainError(f"the weights {path} cannot be read: they claim more memory than there is") from None
    except SafetensorError as error:
        raise StreamtrainError(f"the weights {path} cannot be read: {str(error)[:200]}") from None
    # libraries raise almost any exception for damaged files
    except Exception as error:
        raise StreamtrainError(
            f"the weights {path} cannot be read: damaged, or another kind of file ({type(error).__name__})"
        ) from None


def describe_names(names: Iterable[str]) -> str:
    """Return the first few names and the number of the others; long names are cut."""
    names = list(names)
    shown = [name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 1]}…" for name in names[:_NAMES_SHOWN]]
    more = f" and {len(names) - _NAMES_SHOWN:,} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(shown) + more


def _open(path: Path, stack: ExitStack) -> StateFile:
    if path.is_dir():
        steps = checkpoint.saved_steps(path)
        if steps or (path / checkpoint.STATE_NAME).is_file():
            return _open_checkpoint(path, checkpoint.step_folder(path, steps[-1]) if steps else path, stack)
        if (path / INDEX_NAME).is_file():
            return _open_safetensors(path, _indexed_files(path / INDEX_NAME), stack)
        if not (path / WEIGHTS_NAME).is_file():
            raise StreamtrainError(f"{path} is neither a run with a checkpoint nor a folder with {WEIGHTS_NAME}")
        return _open_safetensors(path, [path / WEIGHTS_NAME], stack)
    if path.exists() and not path.is_file():
        raise StreamtrainError(f"the weights {path} cannot be read: not a regular file")
    with open(path, "rb") as file:
        head = file.read(9)
    if not head:
        raise StreamtrainError(f"the weights {path} cannot be read: the file is empty")
    # the header of safetensors begins after its length
    if path.suffix == ".safetensors" or head[8:] == b"{":
        return _open_safetensors(path, [path], stack)
    _refuse_lfs_pointer(path)
    return _open_torch(path, is_zip=head.startswith(b"PK"))


def _refuse_lfs_pointer(path: Path) -> None:
    """Raise StreamtrainError for the text file that `git clone` without Git LFS leaves in place of weights."""
    with open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise StreamtrainError(f"{path} is a Git LFS pointer without the weights; fetch them with git lfs pull")


def _open_checkpoint(path: Path, folder: Path, stack: ExitStack) -> StateFile:
    reader = stack.enter_context(checkpoint.open_checkpoint(folder))
    keys = {
        f"{network}.{name}": f"{kind}/{name}"
        for network, kind in (("teacher", "ema"), ("student", "master"))
        for name in reader.state["shapes"]
        if reader.has(f"{kind}/{name}") and not is_adapter(name)
    }
    shapes = {name: torch.Size(reader.state["shapes"][key.partition("/")[2]]) for name, key in keys.items()}
    return StateFile(path, shapes, list(shapes), lambda name: reader.read_merged(keys[name]))


def _indexed_files(path: Path) -> list[Path]:
    """Return the files that an index names; raises StreamtrainError unless all are beside it."""
    try:
        weight_map = read_json(path)["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise StreamtrainError(f"{path} cannot be read: {error or type(error).__name__}") from None
    for name in names:
        if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
            raise StreamtrainError(f"{path} refers to {name[:_NAME_LENGTH]!r}, which is not a file beside it")
    if not 0 < len(names) <= _MAX_FILES:
        raise StreamtrainError(f"{path} refers to {len(names)} files")
    return [path.parent / name for name in names]


def _open_safetensors(path: Path, paths: list[Path], stack: ExitStack) -> StateFile:
    for each in paths:
        if each.exists() and not each.is_file():
            raise StreamtrainError(f"the weights {each} cannot be read: not a regular file")
        _refuse_lfs_pointer(each)
    files = [stack.enter_context(safe_open(each, "pt")) for each in paths]
    file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dict
    shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name, file in file_of.items()}
    return StateFile(path, shapes, list(shapes), lambda name: file_of[name].get_tensor(name))


def _open_torch(path: Path, is_zip: bool) -> StateFile:
    names = _zipped_class_names(path) if is_zip else _pickled_class_names(path)
    if len(names) > _MAX_CLASSES:
        raise StreamtrainError(f"{path} contains objects of {len(names)} Python classes; save only the tensors in it")
    # torch itself prefers its own classes to these
    safe: list[Any] = [(_IgnoredDict if name.lower().endswith("dict") else _Ignored, name) for name in names]
    with _no_torch_messages(path), torch.serialization.safe_globals(safe):
        # only the current zip format of torch can be memory-mapped
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    if not isinstance(state, dict | list | tuple):
        kind = "Python object" if isinstance(state, _Ignored) else type(state).__name__
        raise StreamtrainError(f"{path} contains a {kind}, not tensors by name; save the network's state_dict() in it")
    tensors, contents = _flatten(state)
    shapes = {name: value.shape for name, value in tensors.items()}
    return StateFile(path, shapes, contents, tensors.__getitem__)


@contextmanager
def _no_torch_messages(path: Path) -> Iterator[None]:
    """Hide torch's warnings and its advice to programmers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except pickle.UnpicklingError as error:
            words = re.search(r"GLOBAL [\w.]+|[Tt]orchScript", str(error))
            reason = f" (it refers to {words[0].removeprefix('GLOBAL ')})" if words else ""
            raise StreamtrainError(
                f"{path} is no torch file of tensors{reason}: save only the network's state_dict in it"
            ) from None


class _Ignored:
    """Stands for an object of any class in a torch file, such as settings; none of the class's code runs."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _IgnoredDict:
    """Stands for a subclass of dict; torch adds items only to its own list of classes."""

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()


def _zipped_class_names(path: Path) -> set[str]:
    """Return the classes that a zip file of torch refers to.

    Raises:
        StreamtrainError: if it is another zip file, or is compressed, so that its contents have no bound.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise StreamtrainError(f"{path} is a compressed zip file, which torch.save does not write")
            index = next((entry for entry in entries if entry.filename.endswith("/data.pkl")), None)
            if index is None:
                raise StreamtrainError(
                    f"{path} is a zip file with {describe_names([entry.filename for entry in entries]) or 'no files'}, "
                    "but not of torch.save, which has data.pkl"
                )
            with archive.open(index) as file:
                return _class_names(file)
    except zipfile.BadZipFile as error:
        raise StreamtrainError(f"the weights {path} cannot be read: a damaged zip file ({error})") from None


def _pickled_class_names(path: Path) -> set[str]:
    """Return the classes that a file of torch's format before 1.6 refers to: magic number, version, system, state."""
    with open(path, "rb") as file:
        return set().union(*(_class_names(file) for _ in range(4)))


def _class_names(file: IO[bytes]) -> set[str]:
    """Return the ``module.name`` of the classes that a pickle refers to, under their names in Python 3."""
    names = set()
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "GLOBAL":
            module, name = str(argument).split(" ", 1)
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            names.add(f"{module}.{name}")
    return names


def _flatten(state: object) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of nested containers by dotted name, and a description of each top-level value."""
    tensors: dict[str, Tensor] = {}
    contents: list[str] = []
    # the same container can be reached in several ways, even through itself
    seen: set[int] = set()
    remaining, num_values = [(0, "", state)], 0
    while remaining:
        depth, name, value = remaining.pop()
        num_values += 1
        if num_values > _MAX_VALUES:
            raise StreamtrainError(f"the weights contain more than {_MAX_VALUES:,} values")
        inner: list[tuple[Any, Any]] = []
        kind = "other object" if isinstance(value, _Ignored) else type(value).__name__
        if isinstance(value, Tensor):
            tensors[name] = value
            kind = _describe_tensor(value)
        elif isinstance(value, dict) or (isinstance(value, list | tuple) and len(value) <= _MAX_LIST):
            inner = list(value.items() if isinstance(value, dict) else enumerate(value))
            kind = f"{'dict' if isinstance(value, dict) else 'list'} of {len(inner)}"
        if depth == 1:
            contents.append(f"{name} ({kind})")
        if depth < _MAX_DEPTH and id(value) not in seen:
            seen.add(id(value))
            start = f"{name}." if depth else ""
            children = [(depth + 1, f"{start}{key}", each) for key, each in inner if isinstance(key, str | int)]
            remaining += reversed(children)
    return tensors, contents


def _describe_tensor(value: Tensor) -> str:
    """Return kind and shape of a tensor."""
    kind = str(value.dtype).removeprefix("torch.")
    if value.layout != torch.strided:
        kind = f"sparse {kind}"
    return f"{kind} {list(value.shape)}" + ("" if value.device.type == "cpu" else f" on {value.device.type}")
