"""wandb and mlflow themselves, offline, writing to a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import ROOT

from streamtrain.config.load import build
from streamtrain.config.tree import Config
from streamtrain.errors import ConfigError
from streamtrain.reporting import trackers
from streamtrain.reporting.sink import MetricsSink


def a_run(*names: str, **monitor: Any) -> Config:
    return build({"monitor": {"trackers": names, "tensorboard": False, "progress": False, **monitor}})


def report(folder: Path, config: Config, start_step: int, stop_step: int) -> None:
    sink = MetricsSink(folder, config, rank=0, start_step=start_step)
    sink.text("run/config", "seed: 0")
    for step in range(start_step + 1, stop_step + 1):
        sink.log(step, 8 * step, {"loss/total": 1.0 / step, "optim/gradient_norm": float("nan")})
    sink.image(stop_step, np.full((8, 12, 3), 200, np.uint8))
    sink.histogram(stop_step, "weights/embedding", torch.randn(100))
    sink.close()


def test_mlflow_resumes_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    config = a_run("mlflow", project="the project")
    folder = tmp_path / "run"
    folder.mkdir()
    report(folder, config, 0, 3)
    report(folder, config, 3, 5)
    assert "failed" not in caplog.text
    (experiment,) = mlflow.search_experiments(filter_string="name = 'the project'")
    (run,) = mlflow.MlflowClient().search_runs([experiment.experiment_id])
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss/total")
    assert [(point.step, point.value) for point in history] == [(step, 1.0 / step) for step in range(1, 6)]
    assert run.data.params["model.dim"] == "384" and run.info.run_name == "run"
    shown = mlflow.artifacts.list_artifacts(run_id=run.info.run_id, artifact_path="data/crops")
    assert [Path(item.path).name for item in shown] == ["000000003.png", "000000005.png"]


def test_wandb_gets_every_kind_of_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in {"MODE": "offline", "SILENT": "true", "CACHE_DIR": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    # steps are repeated after a crash, and wandb resumes the open run
    with monkeypatch.context() as patch:
        patch.setattr(trackers.WandbTracker, "close", lambda self: None)
        report(tmp_path, a_run("wandb"), 0, 7)
    report(tmp_path, a_run("wandb"), 2, 4)
    assert "failed" not in caplog.text
    wandb.teardown()
    (log,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    written = log.read_bytes()
    assert written.count(b"0.3333333") == 2 * written.count(b"0.1666666") > 0
    for words in (b"loss/total", b"data/crops", b"weights/embedding", b"run/config", b"model.dim"):
        assert words in written, words


def test_a_missing_library_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="mlflow is not installed; pip install mlflow-skinny"):
        trackers.check_trackers(a_run("mlflow").monitor)


def test_unused_libraries_are_not_imported() -> None:
    # only without the engine: DeepSpeed imports wandb if it is installed
    names = "{'wandb', 'mlflow', 'tensorflow', 'tensorboard'}"
    code = f"import streamtrain.reporting.sink, sys; assert not {names} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
