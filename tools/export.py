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

from streamtrain.errors import StreamtrainError
from streamtrain.export.folder import CONFIG_NAME, WEIGHTS_NAME, export_safetensors
from streamtrain.export.hf import export_hf
from streamtrain.export.timm_folder import export_timm

WRITERS = {"hf": export_hf, "timm": export_timm, "safetensors": export_safetensors}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone_arguments(parser)
    parser.add_argument("--to", choices=tuple(WRITERS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; new, empty, or an earlier export")
    arguments = parser.parse_args()
    out: Path = arguments.out
    try:
        if out.exists() and not (out.is_dir() and ((out / CONFIG_NAME).is_file() or not any(out.iterdir()))):
            raise StreamtrainError(f"{out} exists and is no earlier export: choose another --out")
        backbone = load_backbone(arguments)
        WRITERS[arguments.to](backbone.model, backbone.config, out)
    except (StreamtrainError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    millions = sum(parameter.numel() for parameter in backbone.model.parameters()) / 1e6
    print(f"wrote {out / WEIGHTS_NAME} ({millions:.1f} M parameters, {arguments.to})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
