"""``streamtrain export``: write a backbone for use in other libraries."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamtrain.cli.arguments import add_command, writing
from streamtrain.cli.backbone import add_backbone_arguments, load_selected_backbone
from streamtrain.config.load import RESOLVED_NAME
from streamtrain.errors import StreamtrainError
from streamtrain.reporting.metrics import read_metrics
from streamtrain.run.directory import METRICS_NAME

if TYPE_CHECKING:
    from streamtrain.interop.folder import BackboneConfig
    from streamtrain.interop.load import Backbone

FORMATS = ("hf", "timm", "safetensors")

_SUMMARY = "Write the backbone of a run for use in other libraries."
_DETAILS = """\
  hf           a folder for transformers' AutoModel.from_pretrained (needs transformers)
  timm         a folder for timm.create_model("local-dir:DIR", pretrained=True)
  safetensors  our own names, with the model's config in the file and in a JSON file

The settings of the run are copied to recipe.yaml in the same folder.
"""
_EXAMPLES = """\
  streamtrain export --run runs/photos --to hf --out exported
  streamtrain export --run runs/photos --step best --to timm --out exported
  streamtrain export --weights exported --to safetensors --out converted
"""


def add_parser(subparsers: Any) -> None:
    """Add the command and its options."""
    parser = add_command(subparsers, "export", _SUMMARY, _DETAILS, _EXAMPLES)
    add_backbone_arguments(parser)
    parser.add_argument("--to", choices=FORMATS, required=True, help="format of the folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; new, empty, or an earlier export")


def run(arguments: argparse.Namespace) -> int:
    """Export and print a summary."""
    check_out(arguments.out)
    backbone = load_selected_backbone(arguments)
    weights = export_backbone(backbone, arguments.out, arguments.to, arguments.run)
    millions = sum(parameter.numel() for parameter in backbone.model.parameters()) / 1e6
    print(f"wrote {weights} ({millions:.1f} M parameters, {arguments.to})")
    return 0


def check_out(out: Path) -> None:
    """Raise StreamtrainError if ``out`` exists and is neither empty nor an earlier export."""
    from streamtrain.interop.folder import CONFIG_NAME

    if out.exists() and not (out.is_dir() and ((out / CONFIG_NAME).is_file() or not any(out.iterdir()))):
        raise StreamtrainError(f"{out} exists and is not an earlier export; choose another --out")


def export_backbone(backbone: Backbone, out: Path, to: str, run_dir: Path | None) -> Path:
    """Write the backbone to ``out``, with the settings and losses of its run, and return the path of the weights."""
    from streamtrain.interop.folder import RECIPE_NAME, WEIGHTS_NAME, export_safetensors
    from streamtrain.interop.hf import export_hf
    from streamtrain.interop.timm_folder import export_timm

    config = add_losses(backbone.config, run_dir) if run_dir else backbone.config
    write = {"hf": export_hf, "timm": export_timm, "safetensors": export_safetensors}[to]
    with writing(out):
        write(backbone.model, config, out)
        if run_dir:
            shutil.copyfile(run_dir / RESOLVED_NAME, out / RECIPE_NAME)
        else:
            # left by an earlier export
            (out / RECIPE_NAME).unlink(missing_ok=True)
    return out / WEIGHTS_NAME


def add_losses(config: BackboneConfig, run_dir: Path) -> BackboneConfig:
    """Return ``config`` with the logged losses of its step added to the origin."""
    path, step = run_dir / METRICS_NAME, config.origin.get("step")
    record = next((line for line in read_metrics(path) if line["step"] == step), {}) if path.is_file() else {}
    losses = {tag: value for tag, value in record.items() if tag.startswith("loss/")}
    return config.model_copy(update={"origin": config.origin | losses})
