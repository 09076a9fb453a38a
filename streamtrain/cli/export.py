"""``streamtrain export``: write a backbone for use in other libraries."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from streamtrain.cli.arguments import add_command, writing
from streamtrain.cli.backbone import add_backbone_arguments, load_selected_backbone
from streamtrain.config.load import RESOLVED_NAME
from streamtrain.errors import StreamtrainError
from streamtrain.reporting.metrics import read_metrics
from streamtrain.run.command_line import local_path
from streamtrain.run.directory import METRICS_NAME

FORMATS = ("hf", "timm", "safetensors", "onnx")

_SUMMARY = "Write the backbone of a run for use in other libraries."
_DETAILS = """\
  hf           a folder for transformers' AutoModel.from_pretrained (needs transformers)
  timm         a folder for timm.create_model("local-dir:DIR", pretrained=True)
  safetensors  streamtrain's own names, with the model's config in the file and in a JSON file
  onnx         model.onnx, for onnxruntime and other programs without PyTorch (needs onnxscript). Its input is
               pixel_values [batch, channels, height, width], with any multiples of the patch size as height and
               width. Its outputs are cls and patches.

The settings of the run are copied to recipe.yaml in the same folder.

The adapters of a run with model.lora are merged into its weights. With --adapters, only the adapters and the
blocks of model.lora.free_blocks are written, to one safetensors file. Its header has the settings of model.lora.
"""
_EXAMPLES = """\
  streamtrain export --run runs/photos --to hf --out exported
  streamtrain export --run runs/photos --step best --to timm --out exported
  streamtrain export --weights exported --to safetensors --out converted
  streamtrain export --run runs/photos --to onnx --out exported_onnx
  streamtrain export --run runs/adapted --adapters --out adapters.safetensors
"""


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "export", _SUMMARY, _DETAILS, _EXAMPLES)
    add_backbone_arguments(parser)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--to", choices=FORMATS, help="format of the folder")
    kind.add_argument("--adapters", action="store_true", help="with --run: write only its LoRA adapters, to one file")
    parser.add_argument(
        "--out", type=local_path, required=True,
        help="folder to write; new, empty, or an earlier export (with --adapters: a new file)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    if arguments.adapters:
        print(f"wrote {arguments.out} (adapters of {export_selected_adapters(arguments) / 1e6:.2f} M parameters)")
        return 0
    path, num_parameters = export_selected(arguments)
    print(f"wrote {path} (backbone of {num_parameters / 1e6:.1f} M parameters, {arguments.to})")
    return 0


def export_selected(arguments: argparse.Namespace) -> tuple[Path, int]:
    """Export the selected backbone, and return the path of its weights and its number of parameters.

    Raises:
        StreamtrainError: if there is no such backbone, or --out cannot be written.
    """
    # torch takes seconds to load
    from streamtrain.interop.export import check_export_folder, export_backbone

    check_export_folder(arguments.out)
    backbone = load_selected_backbone(arguments)
    recipe, losses = None, {}
    if arguments.run:
        recipe, losses = arguments.run / RESOLVED_NAME, read_losses(arguments.run, backbone.config.origin.get("step"))
    with writing(arguments.out):
        path = export_backbone(backbone, arguments.to, arguments.out, recipe, losses)
    return path, sum(parameter.numel() for parameter in backbone.parameters())


def export_selected_adapters(arguments: argparse.Namespace) -> int:
    """Export the adapters of the selected run, and return the number of their parameters.

    Raises:
        StreamtrainError: if there are none, or --out cannot be written.
    """
    # torch takes seconds to load
    from streamtrain.interop.adapters import export_adapters

    if arguments.run is None or arguments.weights or arguments.untrained or arguments.config or arguments.factory:
        raise StreamtrainError("--adapters belongs to --run RUN, with --step or --student if needed")
    with writing(arguments.out):
        return export_adapters(
            arguments.run, arguments.step, "student" if arguments.student else "teacher", arguments.out
        )


def read_losses(run_dir: Path, step: object) -> dict[str, float]:
    """Return the losses that a run logged at ``step``, by tag."""
    path = run_dir / METRICS_NAME
    record = next((line for line in read_metrics(path) if line["step"] == step), {}) if path.is_file() else {}
    return {tag: value for tag, value in record.items() if tag.startswith("loss/")}
