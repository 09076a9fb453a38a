"""Load a backbone for evaluation, pictures, export and the Python API."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from shards.errors import ShardError
from shards.format.files import parse_json
from shards.format.imagery import array_layout
from streamtrain.checkpoint.reader import iterate_weights, open_checkpoint, weights_folder
from streamtrain.checkpoint.retention import read_best
from streamtrain.config.load import RESOLVED_NAME, read_resolved
from streamtrain.config.model import LoraConfig, ModelConfig
from streamtrain.config.tree import Config
from streamtrain.config.user_code import check_reference
from streamtrain.data.batch import normalise
from streamtrain.data.still_images import Still, centre_crop, decode_image, upright_rgb
from streamtrain.errors import StreamtrainError
from streamtrain.interop.folder import CONFIG_NAME, BackboneConfig, Origin, parse_config, read_document
from streamtrain.interop.hf import MODEL_TYPE, PREPROCESSOR_NAME, backbone_config_from_hf
from streamtrain.interop.load_pretrained import BackboneFile, open_backbone
from streamtrain.interop.state_file import INDEX_NAME, WEIGHTS_NAME, describe_names, readable
from streamtrain.interop.timm_folder import backbone_config_from_timm
from streamtrain.model.factory import build_backbone
from streamtrain.model.initialise import initial_value
from streamtrain.model.vit import Features, VisionTransformer
from streamtrain.run.directory import parse_step

# of the backbone's parameters in a checkpoint
PREFIX = "backbone."
BEST = "best"
HasModel = TypeVar("HasModel", Config, BackboneConfig)
ImageSource = str | Path | Image.Image | np.ndarray


class Backbone(nn.Module):
    """A vision transformer with the preprocessing it was trained with.

    Loaded in eval mode, in fp32, on the CPU, without gradients; ``.to()`` and ``.requires_grad_()`` work as usual.

    Attributes:
        model: the network.
        config: its shape, the preprocessing, and the provenance of the weights.
    """

    def __init__(self, model: VisionTransformer, config: BackboneConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.eval()

    def preprocess(self, images: ImageSource | Sequence[ImageSource], size: int | None = None) -> Tensor:
        """Return images as the network's input.

        The shorter side is resized (bicubic), the central square is cropped, and the channels are normalised.

        Args:
            images: one image or a sequence: path, PIL image, or array of the dtype of training: [height, width,
                channels], [channels, height, width] or, of one channel, [height, width].
            size: side in pixels, a multiple of the patch size; default: the size of the training crops. The margin
                outside the crop, by default none, scales with it.

        Returns:
            [N, channels, size, size] on the device and in the dtype of the parameters.

        Raises:
            StreamtrainError: if a file cannot be read.
            ValueError: for an array of another shape or dtype, or with NaN or infinite values, or a size that is not a
                multiple of the patch size.
        """
        size = self.config.image_size if size is None else size
        if size < 1 or size % self.model.patch_size:
            raise ValueError(f"size {size} is not a multiple of the patch size {self.model.patch_size}")
        is_one = isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4)
        sources: Any = [images] if is_one else images
        opened = (_open_image(source, self.config) for source in sources)
        resize = self.config.resize_for(size)
        crops = torch.from_numpy(np.stack([centre_crop(image, resize, size) for image in opened]))
        parameter = next(self.parameters())
        return normalise(
            crops.to(parameter.device), self.config.mean, self.config.std, parameter.dtype, self.config.value_range
        )

    def forward_features(self, images: Tensor) -> Features:
        """Return normalised features of ``images`` [N, channels, height, width] of a multiple of the patch size.

        Returns:
            ``cls`` [N, dim], ``registers`` [N, num_registers, dim] and ``patches`` [N, num_patches, dim], row by row.
        """
        return self.model.forward_features(images)

    def forward(self, images: Tensor) -> Features:
        return self.forward_features(images)


def load_backbone(
    path: str | Path, step: int | str | None = None, which: str = "teacher", factory: str | None = None
) -> Backbone:
    """Load a backbone from a run directory, an export, or a Hugging Face or timm folder of a DINOv3 ViT.

    Args:
        path: run directory, folder with config.json and safetensors, or a ``.safetensors`` file written by ``export``.
        step: of a run: the checkpoint's step, or ``best``; default: the latest.
        which: of a run: ``teacher`` or ``student``.
        factory: ``module:Class`` of a network trained with ``model.factory``, whose code this executes.

    Raises:
        StreamtrainError: if the path is none of these, or its weights and its config do not match.
    """
    path = Path(path).expanduser()
    if (path / RESOLVED_NAME).is_file():
        return load_run(path, step, which, factory)
    if step is not None or which != "teacher":
        raise StreamtrainError(f"step and which choose a checkpoint of a run, and {path} is not a run directory")
    return load_weights(path, factory)


def load_run(
    run_dir: Path, step: int | str | None = None, which: str = "teacher", factory: str | None = None
) -> Backbone:
    """Load the backbone of a run's checkpoint or teacher snapshot, with LoRA adapters merged into its weights.

    Arguments and errors as in ``load_backbone``.
    """
    config = _without_adapters(_permit_factory(read_resolved(run_dir), factory, run_dir))
    folder = find_checkpoint(run_dir, step, which)
    step = parse_step(folder)
    weights = iterate_weights(run_dir, step, which, lambda name: name.startswith(PREFIX), merged=True)
    origin: Origin = {"source": which, "step": step, "run": config.run.dir, "data": config.data.shards_text}
    with open_checkpoint(folder) as reader:
        # a snapshot of the teacher has no position in the stream
        stream = reader.state.get("data") or {}
    origin |= {"data_digest": stream.get("digest"), "images_seen": stream.get("next_slot")}
    model = _build(config.model, ((name.removeprefix(PREFIX), value) for name, value in weights), str(run_dir))
    return Backbone(model, _config_of_run(config, origin))


def find_checkpoint(run_dir: Path, step: int | str | None, which: str) -> Path:
    """Return the folder of a checkpoint or teacher snapshot; arguments and errors as in ``load_backbone``."""
    if step == BEST:
        best = read_best(run_dir)
        if best is None:
            raise StreamtrainError(f"{run_dir} has no best checkpoint: evaluation.best is null, or not measured")
        step = int(best["step"])
    assert not isinstance(step, str), step
    return weights_folder(run_dir, step, which)


def load_untrained(config: Config) -> Backbone:
    """Return the backbone with the initial values of a run of ``config``, which may name a ``model.factory``."""
    config = _without_adapters(config)
    with torch.device("meta"):
        backbone = build_backbone(config.model)
    values = (
        (name, initial_value(PREFIX + name, tuple(value.shape), config.model, config.run.seed, backbone))
        for name, value in backbone.named_parameters()
    )
    return Backbone(_build(config.model, values, "the configuration"), _config_of_run(config, {"step": 0}))


def load_untrained_run(run_dir: Path, factory: str | None = None) -> Backbone:
    """Return the backbone with the initial values of a run; arguments and errors as in ``load_backbone``."""
    return load_untrained(_permit_factory(read_resolved(run_dir), factory, run_dir))


def load_weights(path: Path, factory: str | None = None) -> Backbone:
    """Load an exported folder, a Hugging Face or timm folder of a DINOv3 ViT, or an exported ``.safetensors`` file.

    Raises:
        StreamtrainError: if it is none of these, or its weights and its config do not match.
    """
    _, is_timm, is_foreign = _read_description(path)
    with open_backbone(path) as file:
        config = describe_weights(path, file, factory)
        return Backbone(_read_model(file, config.model, is_timm, is_foreign), config)


def read_weights_config(path: Path, factory: str | None = None) -> BackboneConfig:
    """Return the description of weights without loading them; arguments and errors as in ``load_weights``."""
    _read_description(path)
    with open_backbone(path) as file:
        return describe_weights(path, file, factory)


def describe_weights(path: Path, file: BackboneFile, factory: str | None = None) -> BackboneConfig:
    """Return the description that weights come with; arguments and errors as in ``load_weights``.

    Args:
        file: the opened ``path``.
    """
    document, is_timm, is_foreign = _read_description(path)
    if is_timm:
        config = backbone_config_from_timm(document, file.shapes(file.preferred()), str(path))
    elif is_foreign:
        preprocessor = path / PREPROCESSOR_NAME
        stated = read_document(preprocessor) if preprocessor.is_file() else None
        config = backbone_config_from_hf(document, stated, str(path))
    else:
        config = parse_config(document, str(path))
    return _permit_factory(config, factory, path)


def needs_factory(path: Path) -> bool:
    """Return whether a run or weights have a network of ``model.factory``; errors as in ``load_weights``."""
    if (path / RESOLVED_NAME).is_file():
        return read_resolved(path).model.factory is not None
    document, _, is_foreign = _read_description(path)
    return not is_foreign and parse_config(document, str(path)).model.factory is not None


def _read_description(path: Path) -> tuple[Any, bool, bool]:
    """Return the config of weights, and whether it is of timm, and of any other library; as in ``load_weights``."""
    if path.is_file():
        return _read_header(path), False, False
    if (path / CONFIG_NAME).is_file() and any((path / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME)):
        document = read_document(path / CONFIG_NAME)
        is_timm = "architecture" in document
        return document, is_timm, is_timm or document.get("model_type") == MODEL_TYPE
    raise StreamtrainError(
        f"{path} is neither a run directory, nor a .safetensors file, nor a folder with {CONFIG_NAME} and "
        f"{WEIGHTS_NAME}"
    )


def _read_model(file: BackboneFile, config: ModelConfig, is_timm: bool, is_foreign: bool) -> VisionTransformer:
    """Return the network with all tensors of a file.

    Raises:
        StreamtrainError: if a tensor is missing or of another shape, or in an export unexpected.
    """
    source = file.state.path
    # a description can claim any size, and building even an empty network takes time
    if config.depth > len(file.state.shapes):
        raise StreamtrainError(f"{source} describes {config.depth} blocks, but has {len(file.state.shapes)} tensors")
    try:
        expected = expected_shapes(config)
    # torch raises either for sizes beyond 64 bits
    except (RuntimeError, TypeError) as error:
        raise StreamtrainError(f"{source} describes a network whose size cannot be computed") from error
    read, report = file.match(expected, minimum=0.0)
    # timm has no mask token
    made_up = {"embedding.mask_token"} if is_timm else set()
    missing = [name for name in (*report.missing, *report.zeroed) if name not in made_up and expected[name].numel()]
    if report.unexpected and not is_foreign:
        raise StreamtrainError(f"{source} contains {report.unexpected[0]}, which this model does not have")
    if report.reshaped:
        raise StreamtrainError(
            f"{source} contains {describe_names(report.reshaped)} in another shape than its description: the first is "
            f"{list(expected[report.reshaped[0]])} there"
        )
    if missing:
        raise StreamtrainError(f"{source} lacks {len(missing)} of {len(expected)} tensors, such as {missing[0]}")

    def value(name: str) -> Tensor:
        tensor = read(name)
        return torch.zeros(expected[name]) if tensor is None else tensor

    return _build(config, ((name, value(name)) for name in expected), str(source))


def _permit_factory(config: HasModel, factory: str | None, source: Path) -> HasModel:
    """Return ``config`` with the ``model.factory`` that the caller gave, not the one that a file names.

    Otherwise the author of the file could choose the module that is imported, and so executed, here.

    Raises:
        StreamtrainError: if the network needs a factory and none was given, or the other way round.
    """
    stored = config.model.factory
    if stored == factory:
        return config
    if stored is None:
        raise StreamtrainError(f"{source} has a built-in network, so it cannot be loaded with the factory {factory}")
    if factory is None:
        raise StreamtrainError(
            f"{source} has a network of its author's own code, {stored}: if you have that code and trust it, add "
            f"--factory {stored} (in Python: factory={stored!r})"
        )
    try:
        check_reference(factory)
    except ValueError as error:
        raise StreamtrainError(f"the factory {factory!r} {error}") from None
    return config.model_copy(update={"model": config.model.model_copy(update={"factory": factory})})


def expected_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Return the names and shapes of a backbone's parameters."""
    with torch.device("meta"):
        return {name: value.shape for name, value in build_backbone(config).state_dict().items()}


def _without_adapters(config: Config) -> Config:
    """Return ``config`` for a network into whose weights the adapters have been merged."""
    return config.model_copy(update={"model": config.model.model_copy(update={"lora": LoraConfig()})})


def _config_of_run(config: Config, origin: Origin) -> BackboneConfig:
    crops = config.crops
    return BackboneConfig(
        model=config.model, image_size=config.square_side, resize=config.square_side, mean=crops.mean, std=crops.std,
        dtype=config.data.dtype or "uint8", value_range=crops.value_range, background=config.data.background_color,
        origin=origin,
    )  # fmt: skip


def _build(config: ModelConfig, weights: Iterable[tuple[str, Tensor]], source: str) -> VisionTransformer:
    """Return a network of shape ``config`` with the tensors of ``weights``, read one at a time.

    Raises:
        StreamtrainError: if a tensor is missing, unexpected, or of another shape.
    """
    with torch.device("meta"):
        model = build_backbone(config)
    expected = model.state_dict()
    state: dict[str, Tensor] = {}
    for name, value in weights:
        if name not in expected:
            raise StreamtrainError(f"{source} contains {name}, which this model does not have")
        if value.shape != expected[name].shape:
            raise StreamtrainError(
                f"{source} contains {name} as {list(value.shape)}, the model has {list(expected[name].shape)}"
            )
        state[name] = value.float()
    missing = sorted(set(expected) - set(state))
    if missing:
        raise StreamtrainError(f"{source} lacks {len(missing)} of {len(expected)} tensors, such as {missing[0]}")
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _open_image(source: ImageSource, config: BackboneConfig) -> Still:
    pixels = config.pixels
    if isinstance(source, str | Path):
        return decode_image(Path(source), source, config.background, pixels)
    if isinstance(source, Image.Image) and pixels.is_rgb:
        return upright_rgb(source, config.background)
    array = np.asarray(source)
    try:
        height, width, is_first = array_layout(array.shape, pixels.channels)
    except ShardError as error:
        raise ValueError(str(error)) from None
    if array.dtype.name != pixels.dtype:
        raise ValueError(
            f"an image array has values of {array.dtype}, the network takes {pixels}; give the stored values"
        )
    array = np.moveaxis(array, 0, 2) if is_first else array.reshape(height, width, -1)
    if not np.isfinite(array).all():
        raise ValueError("an image array has NaN or infinite values")
    return Image.fromarray(np.ascontiguousarray(array)) if pixels.is_rgb else array.astype(pixels.dtype, copy=False)


def _read_header(path: Path) -> Any:
    """Return the config in the header of an exported weights file."""
    with readable(path), open(path, "rb") as start:
        if start.read(9)[8:] != b"{":
            raise StreamtrainError(
                f"the weights {path} cannot be read: not a .safetensors file; torch files do not describe their model "
                "and can only start a run, as init.weights"
            )
    with readable(path), safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("streamtrain")
        if text is None:
            raise StreamtrainError(
                f"{path} does not describe its model: it was not written by streamtrain's export; give a folder with "
                f"{CONFIG_NAME}, or start a run from it with init.weights"
            )
        return parse_json(text)
