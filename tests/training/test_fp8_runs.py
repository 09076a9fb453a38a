"""The loss of a run with FP8 matmuls follows the loss of a bf16 run."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
import torch
from drawn_images import packed_set
from ranks import ROOT, run_ranks

from streamtrain.config.engine import EngineConfig
from streamtrain.engine.runtime import Launch, Runtime
from streamtrain.errors import ConfigError
from streamtrain.reporting.metrics import read_metrics
from streamtrain.training.build import prepare_blocks

STEPS = 40


def losses(shards: Path, run_dir: Path, ranks: int, *overrides: str) -> list[float]:
    """Return the loss of each step of the quick start's network."""
    command = [
        ROOT / "streamtrain" / "main.py", "--config", "quickstart.yaml", f"data.shards={shards}", f"run.dir={run_dir}",
        f"run.steps={STEPS}", "run.checkpoint_every=0", "schedules.freeze_last_layer=40", "schedules.lr.warmup=10",
        "monitor.progress=false", "monitor.panel_every=0", "evaluation.every=0", "engine.dtype=bf16",
        "engine.cpu_threads=1", f"data.micro_batch={32 // ranks}", "data.global_batch=32", *overrides,
    ]  # fmt: skip
    results = run_ranks(command, ranks)
    assert [code for code, _, _ in results] == [0] * ranks, results[0][2][-2000:]
    return [record["loss/total"] for record in read_metrics(run_dir / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [("cpu", torch.float32, r"set engine\.dtype=bf16"), ("cuda", torch.bfloat16, r"this GPU \(Old One\) has no FP8")],
)
def test_a_device_without_fp8_matmuls_is_a_config_error(
    device: str, dtype: torch.dtype, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old One")
    runtime = Runtime(Launch(0, 1, 0, 1), torch.device(device), dtype)
    with pytest.raises(ConfigError, match=message):
        prepare_blocks(torch.nn.Module(), EngineConfig(fp8=True, compile=False), runtime)


@pytest.mark.slow
def test_the_loss_of_a_sharded_fp8_run_follows_bf16(tmp_path: Path) -> None:
    packed_set(tmp_path, 64)
    shards = tmp_path / "set"
    wide, narrow = losses(shards, tmp_path / "bf16", 1), losses(shards, tmp_path / "fp8", 2, "engine.fp8=true")
    assert len(wide) == len(narrow) == STEPS and wide != narrow
    parts = [(fmean(wide[start : start + 10]), fmean(narrow[start : start + 10])) for start in range(0, STEPS, 10)]
    print(parts)
    assert parts[-1][0] < parts[0][0]
    for expected, found in parts:
        assert found == pytest.approx(expected, rel=0.02)
