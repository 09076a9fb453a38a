"""Write a backbone to a folder for use elsewhere."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from streamtrain.errors import StreamtrainError
from streamtrain.interop.folder import CONFIG_NAME, RECIPE_NAME, export_safetensors, parse_config, read_document
from streamtrain.interop.hf import PREPROCESSOR_NAME, export_hf
from streamtrain.interop.load import Backbone
from streamtrain.interop.model_card import CARD_NAME
from streamtrain.interop.onnx_folder import ONNX_NAME, export_onnx
from streamtrain.interop.state_file import INDEX_NAME, WEIGHTS_NAME
from streamtrain.interop.timm_folder import export_timm, is_own_config

WRITERS = {"hf": export_hf, "timm": export_timm, "safetensors": export_safetensors, "onnx": export_onnx}
# a folder inside the export with the files that are being written
_PARTIAL = ".streamtrain-export-"
_FILES = (CONFIG_NAME, RECIPE_NAME, CARD_NAME, PREPROCESSOR_NAME, INDEX_NAME)


def check_export_folder(out: Path) -> None:
    """Raise StreamtrainError unless ``out`` is new, empty, or an earlier export and nothing else."""
    if not (out.exists() or out.is_symlink()):
        return
    try:
        names = sorted(path.name for path in out.iterdir() if not path.name.startswith(_PARTIAL))
    except OSError:
        names = [out.name]
    foreign = [name for name in names if name not in _FILES and not _is_weights(name)]
    if foreign or (names and not _is_own_export(out)):
        shown = f" (it has {foreign[0]})" if foreign and out.is_dir() else ""
        raise StreamtrainError(f"{out} exists and is not an earlier export{shown}: choose another --out")


def export_backbone(
    backbone: Backbone, to: str, out: Path, recipe: Path | None = None, losses: Mapping[str, float] | None = None
) -> Path:
    """Write a backbone to the folder ``out`` and return the path of the weights file.

    Args:
        to: ``hf`` (for transformers), ``timm``, ``safetensors`` (for streamtrain itself) or ``onnx``.
        out: a folder that is new, empty, or an earlier export, whose files are deleted.
        recipe: the run's resolved config, copied to ``out``/recipe.yaml.
        losses: added to the provenance of the weights.

    Raises:
        StreamtrainError: if ``out`` is something else, or the format cannot express the model.
        OSError: if ``out`` cannot be written.
    """
    check_export_folder(out)
    if backbone.config.model.factory is not None and to != "safetensors":
        raise StreamtrainError(
            f"{to} has no network like {backbone.config.model.factory} (model.factory); export it with --to safetensors"
        )
    config = backbone.config.model_copy(update={"origin": backbone.config.origin | dict(losses or {})})
    with _new_files(out) as folder:
        WRITERS[to](backbone.model, config, folder)
        if recipe is not None:
            shutil.copyfile(recipe, folder / RECIPE_NAME)
    return out / (ONNX_NAME if to == "onnx" else WEIGHTS_NAME)


@contextmanager
def _new_files(out: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files replace all files of ``out`` after the ``with`` block, the weights last.

    If this process is killed, ``out`` has its earlier files, or no weights. All files get the mode of an ordinary new
    file, since safetensors makes its files readable by their owner only.
    """
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    for rest in out.glob(f"{_PARTIAL}*"):
        shutil.rmtree(rest, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=out))
    try:
        yield partial
        # the umask cannot be read without changing it
        ordinary = partial / ".mode"
        ordinary.touch()
        mode = ordinary.stat().st_mode & 0o777
        ordinary.unlink()
        files = sorted(
            partial.iterdir(), key=lambda path: (_is_weights(path.name), path.name in (WEIGHTS_NAME, ONNX_NAME))
        )
        # without the earlier weights, a half replaced export cannot be mistaken for a whole one
        for name in sorted(os.listdir(out), key=_is_weights, reverse=True):
            if name in _FILES or _is_weights(name):
                (out / name).unlink()
        for file in files:
            file.chmod(mode)
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if is_new and not any(out.iterdir()):
            out.rmdir()


def _is_weights(name: str) -> bool:
    """Return whether a name is of a weights file; transformers splits large models into several, ONNX in two."""
    return name.startswith("model") and name.endswith((".safetensors", ".onnx", ".onnx.data"))


def _is_own_export(out: Path) -> bool:
    """Return whether ``out`` has a description that only ``export_backbone`` writes."""
    try:
        if (out / CARD_NAME).is_file():
            return "streamtrain" in (out / CARD_NAME).read_text(encoding="utf-8", errors="replace")[:1000]
        document = read_document(out / CONFIG_NAME)
        return is_own_config(document) or bool(parse_config(document, str(out)))
    except (OSError, StreamtrainError):
        return False
