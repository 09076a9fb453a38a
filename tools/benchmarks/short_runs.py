"""Run a few real training steps on ranks of this machine and return their metrics."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from streamtrain.config.load import build, read_resolved, to_yaml
from streamtrain.config.tree import Config
from streamtrain.errors import StreamtrainError

MAIN = Path(__file__).resolve().parents[2] / "streamtrain" / "main.py"


def run_training(
    config: Config, ranks: int, run: dict[str, Any], scratch: Path | None = None
) -> tuple[list[dict[str, Any]], Config]:
    """Train in a temporary run directory; return the records of ``metrics.jsonl`` and the resolved configuration.

    Args:
        run: keys of the ``run`` section.
        scratch: parent of the run directory; None for the system's temporary folder.

    Raises:
        StreamtrainError: the run failed.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        raw = config.model_dump()
        raw["run"] |= {"dir": f"{folder}/run", **run}
        raw["monitor"] |= {"progress": False, "panel_every": 0}
        path = Path(folder) / "config.yaml"
        path.write_text(to_yaml(build(raw)), encoding="utf-8")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        done = subprocess.run([*launcher, str(MAIN), "--config", str(path)], capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line.lower()] or ["no message"]
            raise StreamtrainError(f"the run failed: {errors[-1]}")
        lines = (Path(folder) / "run/metrics.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines], read_resolved(f"{folder}/run")
