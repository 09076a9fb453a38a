"""A backbone for evaluation, pictures and export: from a run, from an exported folder or file, or untrained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shards.format.files import MAX_JSON_BYTES, parse_json
from streamtrain.checkpoint.reader import iterate_weights, open_checkpoint, weights_folder
from streamtrain.config.load import read_resolved
from streamtrain.config.model import ModelConfig
from streamtrain.config.tree import Config
from streamtrain.errors import StreamtrainError
from streamtrain.interop.folder import CONFIG_NAME, WEIGHTS_NAME, BackboneConfig, Origin
from streamtrain.interop.hf import MODEL_TYPE, backbone_config_from_hf
from streamtrain.interop.naming import from_hf
from streamtrain.model.initialise import initial_value
from streamtrain.model.vit import VisionTransformer
from streamtrain.run.directory import parse_step

PREFIX = "backbone."  # of the backbone's parameters within the learner's


@dataclass(frozen=True)
class Backbone:
    """A backbone ready to use.

    Attributes:
        model: in eval mode, fp32, on the CPU, without gradients.
        config: its shape, the image size and colours it was trained with, and where it came from.
    """

    model: VisionTransformer
    config: BackboneConfig


def load_run(run_dir: Path, step: int | None = None, which: str = "teacher") -> Backbone:
    """The backbone of a run's checkpoint, or of its snapshot of the teacher.

    Args:
        run_dir: the run folder.
        step: completed steps; None is the newest checkpoint.
        which: ``teacher`` or ``student``.

    Raises:
        StreamtrainError: if there is no run, or no such checkpoint.
    """
    config = read_resolved(run_dir)
    folder = weights_folder(run_dir, step, which)
    found = parse_step(folder)
    weights = iterate_weights(run_dir, found, which, lambda name: name.startswith(PREFIX))
    origin: Origin = {"source": which, "step": found, "run": config.run.dir, "data": config.data.shards_text}
    with open_checkpoint(folder) as reader:
        # a snapshot of the teacher has no position in the stream
        stream = reader.state.get("data") or {}
    origin |= {"data_digest": stream.get("digest"), "images_seen": stream.get("next_slot")}
    return Backbone(
        fill(config.model, ((name.removeprefix(PREFIX), value) for name, value in weights), str(run_dir)),
        backbone_config(config, origin),
    )


def load_untrained(config: Config) -> Backbone:
    """The backbone as a run of ``config`` starts: every value from its name and ``run.seed``."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in VisionTransformer(config.model).state_dict().items()}
    values = (
        (name, initial_value(PREFIX + name, tuple(shape), config.model, config.run.seed))
        for name, shape in shapes.items()
    )
    return Backbone(fill(config.model, values, "the configuration"), backbone_config(config, {"step": 0}))


def load_weights(path: Path) -> Backbone:
    """The backbone of an exported folder (ours, or a DINOv3 ViT of Hugging Face) or of our ``.safetensors`` file.

    Raises:
        StreamtrainError: if it is none of these, or its weights and its config do not belong together.
    """
    if path.is_file():
        config = _described(path)
        return Backbone(fill(config.model, _tensors(path), str(path)), config)
    if not (path / CONFIG_NAME).is_file() or not (path / WEIGHTS_NAME).is_file():
        raise StreamtrainError(
            f"{path} is neither a .safetensors file nor a folder with {CONFIG_NAME} and {WEIGHTS_NAME}"
        )
    document = _document(path / CONFIG_NAME)
    if document.get("model_type") == MODEL_TYPE:
        return _load_hf(path, document)
    config = _parse(document, path / CONFIG_NAME)
    return Backbone(fill(config.model, _tensors(path / WEIGHTS_NAME), str(path)), config)


def backbone_config(config: Config, origin: Origin) -> BackboneConfig:
    """What belongs beside the weights of a run's backbone."""
    crops = config.crops
    return BackboneConfig(
        model=config.model, image_size=crops.global_size, mean=crops.mean, std=crops.std, origin=origin
    )


def fill(config: ModelConfig, weights: Iterator[tuple[str, Tensor]], source: str) -> VisionTransformer:
    """A backbone of shape ``config`` that takes over the tensors of ``weights``, one at a time.

    Raises:
        StreamtrainError: if a tensor is missing, left over, or of another shape.
    """
    with torch.device("meta"):
        model = VisionTransformer(config)
    wanted = model.state_dict()
    state: dict[str, Tensor] = {}
    for name, value in weights:
        if name not in wanted:
            raise StreamtrainError(f"{source} holds {name}, which this model has no place for")
        if value.shape != wanted[name].shape:
            raise StreamtrainError(
                f"{source} holds {name} as {list(value.shape)}, the model has {list(wanted[name].shape)}"
            )
        state[name] = value.float()
    missing = sorted(set(wanted) - set(state))
    if missing:
        raise StreamtrainError(f"{source} lacks {len(missing)} of {len(wanted)} tensors, such as {missing[0]}")
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _load_hf(path: Path, document: dict[str, Any]) -> Backbone:
    preprocessor = path / "preprocessor_config.json"
    read = _document(preprocessor) if preprocessor.is_file() else None
    config = backbone_config_from_hf(document, read)
    weights = from_hf(dict(_tensors(path / WEIGHTS_NAME)))
    return Backbone(fill(config.model, iter(weights.items()), str(path)), config)


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise StreamtrainError(f"{path} cannot be read: {error}") from None


def _described(path: Path) -> BackboneConfig:
    """The config that our files carry in their header."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("streamtrain")
    except (OSError, SafetensorError) as error:
        raise StreamtrainError(f"{path} cannot be read as safetensors: {error}") from None
    if text is None:
        raise StreamtrainError(f"{path} does not say what model it is: it was not written by streamtrain export")
    return _parse(_value(text, path), path)


def _document(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file."""
    with open(path, "rb") as file:
        found = _value(file.read(MAX_JSON_BYTES + 1), path)
    if not isinstance(found, dict):
        raise StreamtrainError(f"{path} holds a {type(found).__name__}, not a mapping")
    return found


def _value(content: bytes | str, path: Path) -> Any:
    try:
        return parse_json(content)
    except ValueError as error:
        raise StreamtrainError(f"{path} cannot be read: {error}") from None


def _parse(document: object, path: Path) -> BackboneConfig:
    try:
        return BackboneConfig.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StreamtrainError(f"{path} does not describe a streamtrain backbone: {where}: {first['msg']}") from None
