"""Train like ``main.py`` with observers that fail on rank 0: ``failing_observers.py ARGUMENTS``."""

from __future__ import annotations

import os
import sys
from typing import Any

import streamtrain.evaluation.online
import streamtrain.training.observers as observers
from streamtrain.main import main


def fail(*_: Any) -> Any:
    raise RuntimeError("out of ink")


if os.environ["RANK"] == "0":
    observers.batch_panel = fail
    observers.MapsOverTime.components_page = fail  # type: ignore[method-assign]
    observers.MetricsSink.embedding = fail  # type: ignore[method-assign]
    observers.MetricsSink.histogram = fail  # type: ignore[method-assign]
    probe, calls = streamtrain.evaluation.online.linear_accuracy, iter(range(9))
    # fails at the second call
    streamtrain.evaluation.online.linear_accuracy = lambda *rows: fail() if next(calls) else probe(*rows)
status = main()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
