from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from streamtrain.config.load import build
from streamtrain.config.tree import Config
from streamtrain.reporting.metrics import read_metrics
from streamtrain.reporting.monitor import Monitor
from streamtrain.reporting.progress import Progress
from streamtrain.reporting.usage import StepClock, Stopwatch, Work, memory_scalars


def a_run(steps: int, **monitor: Any) -> Config:
    return build({"run": {"steps": steps}, "monitor": monitor})


def run_steps(folder: Path, start: int, stop: int, loss: float) -> None:
    monitor = Monitor(folder, a_run(10, progress=False), rank=0, start_step=start)
    for step in range(start + 1, stop + 1):
        monitor.log(step, step * 8, {"loss/total": loss, "optim/lr": 0.1})
    monitor.panel(stop, np.zeros((8, 12, 3), np.uint8))
    monitor.text("run/config", "seed: 0")
    monitor.close()


def test_a_resumed_run_reads_as_one(tmp_path: Path) -> None:
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


def test_histograms_and_the_layout_of_charts(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, a_run(2, progress=False), rank=0, start_step=0)
    values = torch.tensor([[1.0, 2.0], [float("nan"), float("inf")]])
    monitor.histogram(1, "weights/blocks.0", values)
    monitor.histogram(1, "weights/nothing", values[1])
    monitor.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Histograms("weights/blocks.0")[0].histogram_value.num == 2
    assert events.Tags()["histograms"] == ["weights/blocks.0"]
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_a_warning_is_told_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor(tmp_path, a_run(9, progress=False), rank=0, start_step=0)
    monitor.warn(7, "look at this")
    monitor.log(8, 64, {"loss/total": float("nan"), "optim/lr": 0.1})
    monitor.close()
    assert capsys.readouterr().err == "warning: look at this\n"
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("warnings/text_summary")[-1:]
    assert event.step == 7 and b"look at this" in event.tensor_proto.string_val[0]
    assert events.Tags()["scalars"] == ["optim/lr"]


def test_off_rank_0_nothing_is_written(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, a_run(10), rank=1, start_step=0)
    monitor.log(1, 8, {"loss/total": 1.0})
    monitor.panel(1, np.zeros((8, 8, 3), np.uint8))
    monitor.text("run/config", "")
    monitor.close()
    assert list(tmp_path.iterdir()) == []


def test_without_tensorboard_only_the_log_is_written(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, a_run(2, tensorboard=False, progress=False), rank=0, start_step=0)
    monitor.log(1, 8, {"loss/total": 1.0})
    monitor.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_progress_in_a_log_file_is_lines_few_and_far_between() -> None:
    stream = io.StringIO()
    progress = Progress(200, 100, stream)
    for step in range(101, 201):
        progress.update(step, {"loss/total": 2.5, "speed/images_per_second": 31.25})
    progress.say("warning: look at this")
    progress.close()
    first, last, warning = stream.getvalue().splitlines()
    assert first.startswith("step 101/200: loss 2.5000, 31.2 images/s, ")
    assert last == "step 200/200: loss 2.5000, 31.2 images/s, 00:00 to go"
    assert warning == "warning: look at this" and "\r" not in stream.getvalue()


def test_progress_on_a_terminal_is_one_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = Progress(4, 1, stream)
    for step in (2, 3, 4):
        progress.update(step, {"loss/total": 2.5})
    progress.close()
    last = stream.getvalue().split("\r")[-1]
    assert "4/4" in last and "loss 2.5000" in last


def test_memory_and_clock_report_under_their_tags() -> None:
    memory = memory_scalars(torch.device("cpu"))
    assert set(memory) == {"memory/rss_bytes", "memory/peak_rss_bytes"}
    # The kernel keeps the two counts apart and only loosely in step.
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
    # it has waited in the first step only
    assert scalars["data/wait_share"] == 0.0
    assert "speed/mfu" not in StepClock().tick(Work(1, 1, 1.0), 0.0)


def test_a_stopwatch_counts_what_is_within_its_blocks() -> None:
    watch = Stopwatch()
    for _ in range(2):
        time.sleep(0.05)
        with watch:
            time.sleep(0.05)
    assert 0.3 < watch.share < 0.6


def test_a_tracker_that_fails_is_told_about_once_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = Monitor(tmp_path, a_run(3, progress=False), rank=0, start_step=0)
    monitor.log(1, 8, {"loss/total": 1.0})
    monitor.panel(1, np.zeros((8, 8), np.uint8))  # no picture: two dimensions only
    monitor.log(2, 16, {"loss/total": 1.0})
    monitor.close()
    assert capsys.readouterr().err.startswith("warning: EventWriter gets nothing more, since it has failed: ")
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
