from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import ROOT
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext

import streamtrain.reporting.sink as sink_module
from streamtrain.config.load import build, load_config
from streamtrain.config.tree import Config
from streamtrain.reporting.metrics import read_metrics
from streamtrain.reporting.sink import MetricsSink
from streamtrain.reporting.tensorboard import changed_hyperparameters, hyperparameters
from streamtrain.reporting.usage import StepClock, Stopwatch, Work, memory_scalars
from streamtrain.run.tags import TAGS


def a_run(steps: int, **monitor: Any) -> Config:
    return build({"run": {"steps": steps}, "monitor": monitor})


def run_steps(folder: Path, start: int, stop: int, loss: float) -> None:
    sink = MetricsSink(folder, a_run(10, progress=False), rank=0, start_step=start)
    for step in range(start + 1, stop + 1):
        sink.log(step, step * 8, {"loss/total": loss, "optim/lr": 0.1})
    sink.image(stop, np.zeros((8, 12, 3), np.uint8))
    sink.text("run/config", "seed: 0")
    sink.close()


def test_a_resumed_run_has_one_continuous_log(tmp_path: Path) -> None:
    run_steps(tmp_path, 0, 6, 1.0)
    time.sleep(1.1)  # event files are named by the second
    run_steps(tmp_path, 4, 8, 2.0)
    losses = [record["loss/total"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses == [1.0] * 4 + [2.0] * 4
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/total")] == [
        (step, 1.0 if step <= 4 else 2.0) for step in range(1, 9)
    ]
    assert events.Images("data/crops")[-1].step == 8
    assert (events.Images("data/crops")[-1].width, events.Images("data/crops")[-1].height) == (12, 8)


def test_tags_have_descriptions_and_units_in_tensorboard(tmp_path: Path) -> None:
    sink = MetricsSink(tmp_path, a_run(2, progress=False), rank=0, start_step=0)
    for step in (1, 2):
        sink.log(step, 8 * step, dict.fromkeys(TAGS, 1.0))
    sink.close()
    # what TensorBoard's own pages read
    multiplexer = EventMultiplexer()
    multiplexer.AddRun(str(tmp_path / "tensorboard"), "run")
    multiplexer.Reload()
    provider, context = MultiplexerDataProvider(multiplexer, str(tmp_path)), RequestContext()
    scalars = provider.list_scalars(context, experiment_id="", plugin_name="scalars")["run"]
    assert {tag: series.description for tag, series in scalars.items()} == {tag: TAGS[tag].text for tag in TAGS}
    assert scalars["speed/step_seconds"].description.endswith("Unit: seconds.")
    # and what programs read
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(TAGS)
    assert [(event.step, event.value) for event in events.Scalars("loss/total")] == [(1, 1.0), (2, 1.0)]


def test_metrics_before_training_are_at_step_0_once(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        # stopped before the first checkpoint, and started again
        sink = MetricsSink(tmp_path, a_run(3, progress=False), rank=0, start_step=0)
        sink.log_before_training({"eval/knn_20": loss, "eval/linear": float("nan")})
        sink.log(1, 8, {"loss/total": loss, "eval/knn_20": loss})
        sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("eval/knn_20")] == [(0, 2.0), (1, 2.0)]
    # a completed step has a line, step 0 has none
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_hyperparameters_are_the_recipe_and_what_differs_from_it() -> None:
    config = load_config("quickstart.yaml", ["optim.clip=1.0", "data.shards=sets/a", "monitor.panel_every=7"])
    values = hyperparameters(config)
    assert values["recipe"] == "quickstart.yaml" and values["optim.clip"] == 1.0 and values["data.shards"] == "sets/a"
    assert set(values) - {"recipe", "optim.clip"} == {
        "data.micro_batch", "data.shards", "model.depth", "model.dim", "run.seed", "run.steps", "schedules.lr.peak",
    }  # fmt: skip
    # trackers outside TensorBoard get all settings that differ from their defaults
    assert len(changed_hyperparameters(config)) > 20


def test_histograms_and_the_layout_of_charts(tmp_path: Path) -> None:
    sink = MetricsSink(tmp_path, a_run(2, progress=False), rank=0, start_step=0)
    values = torch.tensor([[1.0, 2.0], [float("nan"), float("inf")]])
    sink.histogram(1, "weights/blocks.0", values)
    sink.histogram(1, "weights/nothing", values[1])
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Histograms("weights/blocks.0")[0].histogram_value.num == 2
    assert events.Tags()["histograms"] == ["weights/blocks.0"]
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_a_warning_is_logged_and_kept_in_tensorboard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = MetricsSink(tmp_path, a_run(9, progress=False), rank=0, start_step=0)
    sink.warn(7, "look at this")
    sink.log(8, 64, {"loss/total": float("nan"), "optim/lr": 0.1})
    sink.close()
    assert [record.message for record in caplog.records] == ["look at this"]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("warnings/text_summary")[-1:]
    assert event.step == 7 and b"look at this" in event.tensor_proto.string_val[0]
    assert events.Tags()["scalars"] == ["optim/lr"]


def test_only_rank_0_writes(tmp_path: Path) -> None:
    sink = MetricsSink(tmp_path, a_run(10), rank=1, start_step=0)
    sink.log(1, 8, {"loss/total": 1.0})
    sink.image(1, np.zeros((8, 8, 3), np.uint8))
    sink.text("run/config", "")
    sink.close()
    assert list(tmp_path.iterdir()) == []


def test_without_tensorboard_only_the_log_is_written(tmp_path: Path) -> None:
    sink = MetricsSink(tmp_path, a_run(2, tensorboard=False, progress=False), rank=0, start_step=0)
    sink.log(1, 8, {"loss/total": 1.0})
    sink.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_memory_and_speed_metrics() -> None:
    memory = memory_scalars(torch.device("cpu"))
    assert set(memory) == {"memory/rss_bytes", "memory/peak_rss_bytes"}
    # the kernel updates the two counters independently
    assert 1e7 < memory["memory/rss_bytes"] <= 1.05 * memory["memory/peak_rss_bytes"] < 1e12
    clock = StepClock(peak_flops=2e6)
    for _ in range(3):
        time.sleep(0.05)
        scalars = clock.tick(Work(images=10, tokens=700, model_flops=1e5), wait_seconds=0.02)
    seconds = scalars["speed/step_seconds"]
    assert 0.05 <= scalars["speed/step_seconds_p50"] <= scalars["speed/step_seconds_p99"] < 1.0
    per_second = {"images_per_second": 10, "tokens_per_second": 700, "model_flops_per_second": 1e5, "mfu": 0.05}
    for name, of_step in per_second.items():
        assert np.isclose(scalars[f"speed/{name}"] * seconds, of_step)
    # only the first step waited
    assert scalars["data/wait_share"] == 0.0
    assert "speed/mfu" not in StepClock().tick(Work(1, 1, 1.0), 0.0)


def test_stopwatch_measures_the_share_inside_its_blocks() -> None:
    watch = Stopwatch()
    for _ in range(2):
        time.sleep(0.05)
        with watch:
            time.sleep(0.05)
    assert 0.3 < watch.share < 0.6


def test_a_failing_picture_is_logged_once_with_a_traceback_and_the_rest_is_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = MetricsSink(tmp_path, a_run(3, progress=False), rank=0, start_step=0)
    sink.log(1, 8, {"loss/total": 1.0})
    for _ in range(2):
        sink.image(1, np.zeros((8, 8), np.uint8))  # not an image: it has two dimensions
    sink.log(2, 16, {"loss/total": 1.0})
    sink.close()
    (record,) = caplog.records
    assert record.message == "TensorBoard failed and is left out; training continues" and record.exc_info
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/total")] == [1, 2]


def test_after_a_slow_failure_a_tracker_is_left_alone_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Unreachable:
        def scalars(self, step: int, scalars: Any) -> None:
            calls.append(step)
            time.sleep(0.05)
            raise ConnectionError("no route to host")

    monkeypatch.setattr(sink_module, "SLOW_SECONDS", 0.02)
    monkeypatch.setattr(sink_module, "tracker_openers", lambda *_: {"tracker": Unreachable})
    sink = MetricsSink(tmp_path, a_run(3, progress=False, tensorboard=False), rank=0, start_step=0)
    assert sink.has_trackers
    for step in (1, 2, 3):
        sink.log(step, 8, {"loss/total": 1.0})
    assert calls == [1] and not sink.has_trackers
    # 20 times as long as the failure, which takes longer on a busy machine
    deadline = time.monotonic() + 60
    while not sink.has_trackers and time.monotonic() < deadline:
        time.sleep(0.1)
    sink.log(4, 8, {"loss/total": 1.0})
    assert calls == [1, 4]


def test_text_and_names_are_escaped(tmp_path: Path) -> None:
    sink = MetricsSink(tmp_path, a_run(3, progress=False), rank=0, start_step=0)
    sink.text("run/config", "caf\udce9\n\x1b[31mred")
    thumbnails = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    sink.embedding(1, torch.zeros(2, 3), ["caf\udce9", "a\tb\nc\x1b"], thumbnails)
    sink.close()
    labels = (tmp_path / "tensorboard/projector/first-labels.tsv").read_text(encoding="utf-8")
    assert labels.splitlines() == ["caf\\udce9", "a b c\\x1b"]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("run/config/text_summary")[0].tensor_proto.string_val
    assert text == b"caf\\udce9\n\\x1b[31mred"


def test_tensorflow_is_not_imported_where_it_is_installed(tmp_path: Path) -> None:
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('tensorflow was imported')")
    code = (
        "import sys; from pathlib import Path; from streamtrain.config.tree import Config\n"
        "from streamtrain.reporting.tensorboard import EventWriter, read_logged\n"
        "writer = EventWriter(Path(sys.argv[1]), 0, Config()); writer.scalars(1, {'loss/total': 1.0}); writer.close()\n"
        "assert read_logged(Path(sys.argv[1])).images == {}"
    )
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-c", code, str(tmp_path / "tensorboard")]
    done = subprocess.run(command, env={**os.environ, **path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
