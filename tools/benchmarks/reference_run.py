"""Store the curves of a completed healthy run for the reports of later runs with its recipe."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shards.format.files import read_json, write_whole
from streamtrain.config.load import read_resolved
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.reference_curve import FOLDER, describe_curves
from streamtrain.evaluation.verdict import read_baselines
from streamtrain.reporting.metrics import read_metrics
from streamtrain.run.directory import METRICS_NAME
from streamtrain.run.provenance import ENVIRONMENT_NAME


def run(run_dir: Path, images: str, recipe: str | None, out: Path | None) -> dict[str, Any]:
    """Write the curves of a run to ``out`` (default: the file of its recipe in the package); return path and sizes.

    Args:
        images: words for the images of the run, as in "2,400 drawn images".
        recipe: file name of the shipped recipe; default: the closest one.
    """
    config = read_resolved(run_dir)
    try:
        records, environment = list(read_metrics(run_dir / METRICS_NAME)), read_json(run_dir / ENVIRONMENT_NAME)
    except OSError as error:
        raise StreamtrainError(f"{run_dir} is not a complete run: {error}") from None
    curves = describe_curves(records, config, environment, read_baselines(run_dir), images, recipe)
    path = out or FOLDER / f"{Path(curves.recipe).stem}.json"
    described = asdict(curves)
    tags = described.pop("curves")
    # a line per curve
    lines = ",\n".join(f"  {json.dumps(tag)}: {json.dumps(pair, separators=(',', ':'))}" for tag, pair in tags.items())
    head = json.dumps(described, indent=1)[: -len("\n}")]
    content = f'{head},\n "curves": {{\n{lines}\n }}\n}}\n'.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
    return {"file": str(path), "recipe": curves.recipe, "curves": len(tags), "bytes": len(content)}
