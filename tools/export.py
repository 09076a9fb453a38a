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
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backbone_arguments import add_backbone_arguments, load_backbone
from outputs import writing

from streamtrain.errors import StreamtrainError

if TYPE_CHECKING:
    from streamtrain.interop.folder import BackboneConfig


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
    """Write the backbone; returns what to say of it."""
    # torch takes seconds to load
    from streamtrain.config.load import RESOLVED_NAME
    from streamtrain.interop.folder import CONFIG_NAME, RECIPE_NAME, WEIGHTS_NAME, export_safetensors
    from streamtrain.interop.hf import export_hf
    from streamtrain.interop.timm_folder import export_timm

    if out.exists() and not (out.is_dir() and ((out / CONFIG_NAME).is_file() or not any(out.iterdir()))):
        raise StreamtrainError(f"{out} exists and is no earlier export: choose another --out")
    backbone = load_backbone(arguments)
    config = with_losses(backbone.config, arguments.run) if arguments.run else backbone.config
    write = {"hf": export_hf, "timm": export_timm, "safetensors": export_safetensors}[arguments.to]
    with writing(out):
        write(backbone.model, config, out)
        if arguments.run:
            shutil.copyfile(arguments.run / RESOLVED_NAME, out / RECIPE_NAME)
        else:
            # an earlier export's
            (out / RECIPE_NAME).unlink(missing_ok=True)
    millions = sum(parameter.numel() for parameter in backbone.model.parameters()) / 1e6
    return f"wrote {out / WEIGHTS_NAME} ({millions:.1f} M parameters, {arguments.to})"


def with_losses(config: BackboneConfig, run_dir: Path) -> BackboneConfig:
    """``config`` whose origin also tells the losses of its step, where they are on record."""
    from streamtrain.reporting.metrics import read_metrics
    from streamtrain.run.directory import METRICS_NAME

    path, step = run_dir / METRICS_NAME, config.origin.get("step")
    record = next((line for line in read_metrics(path) if line["step"] == step), {}) if path.is_file() else {}
    losses = {tag: value for tag, value in record.items() if tag.startswith("loss/")}
    return config.model_copy(update={"origin": config.origin | losses})


if __name__ == "__main__":
    sys.exit(main())
