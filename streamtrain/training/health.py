"""The verdict on the health of a run at its end."""

from __future__ import annotations

from pathlib import Path

from streamtrain.config.tree import Config
from streamtrain.evaluation.health import USED_TAGS, judge_health
from streamtrain.reporting.metrics import read_metrics
from streamtrain.run.directory import METRICS_NAME

# of a larger metrics file, only a part of the lines without collapse metrics is parsed
_MAX_BYTES = 1 << 24


def describe_health(run_dir: Path, config: Config) -> str | None:
    """Return the verdict in one line; None if the metrics cannot be read."""
    path = run_dir / METRICS_NAME
    try:
        lines = read_metrics(path, path.stat().st_size // _MAX_BYTES + 1)
        # a run has many records with many tags
        records = [{tag: record[tag] for tag in USED_TAGS if tag in record} for record in lines]
    except OSError:
        return None
    if not records:
        return None
    finding = judge_health(records, config)
    return f"health: {finding.title}. {finding.text}"
