"""Write a backbone to a folder for use elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from streamtrain.errors import StreamtrainError
from streamtrain.interop.folder import CONFIG_NAME, RECIPE_NAME, export_safetensors
from streamtrain.interop.hf import export_hf
from streamtrain.interop.load import Backbone
from streamtrain.interop.state_file import WEIGHTS_NAME
from streamtrain.interop.timm_folder import export_timm

WRITERS = {"hf": export_hf, "timm": export_timm, "safetensors": export_safetensors}


def check_export_folder(out: Path) -> None:
    """Raise StreamtrainError unless ``out`` is new, empty, or an earlier export."""
    if out.exists() and not (out.is_dir() and ((out / CONFIG_NAME).is_file() or not any(out.iterdir()))):
        raise StreamtrainError(f"{out} exists and is not an earlier export: choose another --out")


def export_backbone(
    backbone: Backbone, to: str, out: Path, recipe: Path | None = None, losses: Mapping[str, float] | None = None
) -> Path:
    """Write a backbone to the folder ``out`` and return the path of the weights file.

    Args:
        to: ``hf`` (for transformers), ``timm`` or ``safetensors`` (for streamtrain itself).
        out: a folder that is new, empty, or an earlier export.
        recipe: the run's resolved config, copied to ``out``/recipe.yaml.
        losses: added to the provenance of the weights.

    Raises:
        StreamtrainError: if ``out`` is something else, or the format cannot express the model.
        OSError: if ``out`` cannot be written.
    """
    check_export_folder(out)
    config = backbone.config.model_copy(update={"origin": backbone.config.origin | dict(losses or {})})
    WRITERS[to](backbone.model, config, out)
    if recipe is not None:
        shutil.copyfile(recipe, out / RECIPE_NAME)
    else:
        # remove the recipe of an earlier export
        (out / RECIPE_NAME).unlink(missing_ok=True)
    return out / WEIGHTS_NAME
