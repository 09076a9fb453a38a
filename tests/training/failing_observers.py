"""Train like ``main.py`` with observers that fail on rank 0: ``failing_observers.py ARGUMENTS``."""

from __future__ import annotations

import os
import sys
from typing import Any

import streamtrain.evaluation.online as online
import streamtrain.training.observers as observers
from streamtrain.main import main


def fail(*_: Any) -> Any:
    raise RuntimeError("out of ink")


if os.environ["RANK"] == "0":
    observers.batch_panel = fail
    observers.MapsOverTime.components_page = fail  # type: ignore[method-assign]
    observers.MetricsSink.embedding = fail  # type: ignore[method-assign]
    observers.MetricsSink.histogram = fail  # type: ignore[method-assign]
    observers.Profiler = fail  # type: ignore[assignment, misc]
    # after the one before training, the second evaluation fails in the probe, the third while it loads the images
    probe, probes = online.linear_accuracy, iter(range(9))
    online.linear_accuracy = lambda *rows: fail() if next(probes) == 2 else probe(*rows)
    batches, evaluations = online.crop_batches, iter(range(99))
    online.crop_batches = lambda *arguments: iter(fail, 0) if next(evaluations) == 13 else batches(*arguments)
status = main()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
