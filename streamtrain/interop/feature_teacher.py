"""Find the architecture of weights in their description or in the shapes of their tensors. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamtrain.config.feature_teacher import find_teacher_fault
from streamtrain.config.load import RESOLVED_NAME, read_resolved
from streamtrain.config.tree import Config
from streamtrain.errors import ConfigError, StreamtrainError

if TYPE_CHECKING:
    from streamtrain.config.model import ModelConfig
    from streamtrain.interop.folder import BackboneConfig
    from streamtrain.interop.load_pretrained import BackboneFile

_PERIODS = "rope_embed.periods"
# settings that change a network's features but no tensor's shape
_WITHOUT_SHAPE = ("num_heads", "rope_base")


def with_teacher_model(config: Config) -> Config:
    """Return ``config`` with ``teacher.model`` of the backbone in ``teacher.weights``.

    A run directory is a teacher with heads, unless ``teacher.model`` is set; the configuration then stays as it is.

    Raises:
        StreamtrainError: if the weights are neither a run nor a backbone, or do not fit the settings.
    """
    teacher = config.teacher
    if teacher.kind != "frozen":
        return config
    if teacher.weights is None:
        raise ConfigError("teacher.kind: frozen needs teacher.weights, a run directory or a backbone")
    if teacher.model is not None:
        return config
    path = Path(teacher.weights)
    if (path / RESOLVED_NAME).is_file():
        if teacher.loss != "cosine" or teacher.projector_layers != 1:
            raise ConfigError(
                f"teacher.weights {path} is a run, whose teacher has heads, so teacher.loss and "
                "teacher.projector_layers have no effect; remove them, or export the run's backbone"
            )
        return config
    if not path.exists():
        raise ConfigError(f"teacher.weights: there is no file or folder {path}")
    try:
        model = describe_backbone(path, config.model.factory).model
    except StreamtrainError as error:
        raise ConfigError(f"teacher.weights: {error}") from None
    updated = teacher.model_copy(update={"model": model.model_dump(mode="json")})
    complete = config.model_copy(update={"teacher": updated})
    if fault := find_teacher_fault(complete):
        raise ConfigError(fault)
    return complete


def check_stated_model(path: Path, model: ModelConfig, setting: str) -> None:
    """Check that weights do not state another number of heads or RoPE base; weights that state nothing pass.

    Args:
        path: a run directory, or weights as in ``describe_backbone``.
        setting: key of the setting that names ``path``, for error messages.

    Raises:
        ConfigError: if they differ; the tensors would fit, but the features would be others.
    """
    try:
        is_run = (path / RESOLVED_NAME).is_file()
        stated = read_resolved(path).model if is_run else describe_backbone(path, model.factory).model
    except StreamtrainError:
        return
    names = [name for name in _WITHOUT_SHAPE if getattr(stated, name) != getattr(model, name)]
    if names:
        differ = ", ".join(f"model.{name} {getattr(stated, name)}, not {getattr(model, name)}" for name in names)
        raise ConfigError(f"{setting}: {path} has {differ}; set the model section to its architecture")


def describe_backbone(path: Path, factory: str | None = None, model: ModelConfig | None = None) -> BackboneConfig:
    """Return the shape and the preprocessing of the backbone in a file or folder.

    Args:
        factory: class that the caller permits for weights of a network with ``model.factory``.
        model: the shape, if the caller knows it; the weights then need no description.

    Raises:
        StreamtrainError: if the weights cannot be read, have no backbone of this architecture, or do not state their
            number of heads.
    """
    from streamtrain.interop.folder import BackboneConfig  # torch takes seconds to load
    from streamtrain.interop.load import describe_weights, needs_factory
    from streamtrain.interop.load_pretrained import open_backbone

    with open_backbone(path) as file:
        group = min(file.groups, key=lambda each: each.rank)
        file.refuse_positions(group)
        if _has_description(path):
            described = describe_weights(path, file, factory if needs_factory(path) else None)
            return described if model is None else described.model_copy(update={"model": model})
        side = 16 * (model.patch_size if model else 16)
        fields: dict[str, Any] = {"model": model or _model_of_tensors(file), "image_size": side}
        return BackboneConfig.model_validate(fields)


def _has_description(path: Path) -> bool:
    """Return whether weights state their model: in a folder's config.json, or in the header of an exported file."""
    from safetensors import safe_open

    from streamtrain.interop.folder import CONFIG_NAME
    from streamtrain.interop.state_file import readable

    if path.is_dir():
        return (path / CONFIG_NAME).is_file()
    if path.suffix != ".safetensors":
        return False
    with readable(path), safe_open(path, "pt") as file:
        return "streamtrain" in (file.metadata() or {})


def _model_of_tensors(file: BackboneFile) -> dict[str, Any]:
    """Return the model section of weights without a description, such as Meta's files.

    Raises:
        StreamtrainError: if tensors are missing, or the number of heads is unknown.
    """
    from streamtrain.interop.naming import DINOV3
    from streamtrain.interop.timm_folder import has_all_sizes, model_from_shapes

    group, source = file.preferred(), file.state.path
    shapes = file.shapes(group)
    if not has_all_sizes(shapes):
        raise StreamtrainError(f"{source} has no patch embedding or no blocks, so it is not the whole backbone")
    model = model_from_shapes(shapes)
    norms = [name for name, norm in (("cls", "cls_norm"), ("local_cls", "local_norm")) if f"{norm}.weight" in shapes]
    model["untied_norms"] = "_and_".join(norms) or "none"
    # without a mask, the bias of a DINOv3 file includes the keys
    model["key_bias"] |= group.naming is DINOV3 and model["qkv_bias"] and not group.has_bias_mask(file.state.shapes)
    periods = file.state.shapes.get(f"{group.prefix}{_PERIODS}")
    if periods is None or len(periods) != 1 or not periods[0]:
        raise StreamtrainError(
            f"{source} does not state its number of attention heads; set teacher.model to its architecture, such as "
            "teacher.model.preset=vitl16"
        )
    # each period gives a sine and a cosine on each of two axes
    model["num_heads"] = model["dim"] // (4 * periods[0])
    return model
