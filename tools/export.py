#!/usr/bin/env python3
"""Write a run's backbone for use elsewhere.

python tools/export.py --run RUN [--step N] [--student] --to hf|timm|safetensors --out DIR

hf: a folder for transformers' AutoModel.from_pretrained (needs transformers).
timm: a folder for timm.create_model("local-dir:DIR", pretrained=True).
safetensors: our own names, the model's config beside it and in the file.
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
    """Write the backbone; returns what to say of it."""
    # torch takes seconds to load
    from streamtrain.export.folder import CONFIG_NAME, WEIGHTS_NAME, export_safetensors
    from streamtrain.export.hf import export_hf
    from streamtrain.export.timm_folder import export_timm

    if out.exists() and not (out.is_dir() and ((out / CONFIG_NAME).is_file() or not any(out.iterdir()))):
        raise StreamtrainError(f"{out} exists and is no earlier export: choose another --out")
    backbone = load_backbone(arguments)
    write = {"hf": export_hf, "timm": export_timm, "safetensors": export_safetensors}[arguments.to]
    with writing(out):
        write(backbone.model, backbone.config, out)
    millions = sum(parameter.numel() for parameter in backbone.model.parameters()) / 1e6
    return f"wrote {out / WEIGHTS_NAME} ({millions:.1f} M parameters, {arguments.to})"


if __name__ == "__main__":
    sys.exit(main())
