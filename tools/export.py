#!/usr/bin/env python3
"""Write a run's backbone for use elsewhere.

python tools/export.py --run RUN [--step N] [--student] --to hf|timm|safetensors --out DIR

hf: a folder for transformers' AutoModel.from_pretrained (needs transformers).
timm: a folder for timm.create_model("local-dir:DIR", pretrained=True).
safetensors: our own names, the model's config beside it and in the file.
Beside the weights of a run lies recipe.yaml, its settings.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backbone_arguments import add_backbone_arguments, load_backbone
from outputs import writing

from streamtrain.errors import StreamtrainError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone_arguments(parser)
    parser.add_argument("--to", choices=("hf", "timm", "safetensors"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; new, empty, or an earlier export")
    arguments = parser.parse_args()
    out: Path = arguments.out
    try:
        print(export(arguments, out))
    except StreamtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def export(arguments: argparse.Namespace, out: Path) -> str:
    """Write the backbone and return the message for the user."""
    # torch takes seconds to load
    from streamtrain.config.load import RESOLVED_NAME
    from streamtrain.interop.export import check_export_folder, export_backbone

    check_export_folder(out)
    backbone = load_backbone(arguments)
    recipe, losses = None, {}
    if arguments.run:
        recipe, losses = arguments.run / RESOLVED_NAME, read_losses(arguments.run, backbone.config.origin.get("step"))
    with writing(out):
        path = export_backbone(backbone, arguments.to, out, recipe, losses)
    millions = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
    return f"wrote {path} ({millions:.1f} M parameters, {arguments.to})"


def read_losses(run_dir: Path, step: object) -> dict[str, float]:
    """Return the losses of ``step`` from a run's metrics; empty if it has no record of the step."""
    from streamtrain.reporting.metrics import read_metrics
    from streamtrain.run.directory import METRICS_NAME

    path = run_dir / METRICS_NAME
    record = next((line for line in read_metrics(path) if line["step"] == step), {}) if path.is_file() else {}
    return {tag: value for tag, value in record.items() if tag.startswith("loss/")}


if __name__ == "__main__":
    sys.exit(main())
