"""A trace of selected steps, for ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from streamtrain.config.monitor import ProfileConfig

FOLDER_NAME = "profile"
logger = logging.getLogger(__name__)


class Profiler:
    """Traces the steps of ``monitor.profile`` on this rank."""

    def __init__(self, run_dir: Path, config: ProfileConfig, rank: int, start_step: int) -> None:
        """``start_step``: completed steps."""
        self._run_dir, self._config, self._rank = run_dir, config, rank
        self._profile: torch.profiler.profile | None = None
        self._start_before(start_step + 1)

    def step_completed(self, step: int) -> None:
        """Write the trace if ``step`` was its last step; start the trace if the next step is its first."""
        first = self._config.start
        if self._profile is not None and first is not None and step >= first + self._config.steps - 1:
            self._write(first, step)
        self._start_before(step + 1)

    def close(self) -> None:
        """Stop an incomplete trace without writing it."""
        if self._profile is not None:
            self._profile.stop()

    def _start_before(self, step: int) -> None:
        if step == self._config.start:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities)
            self._profile.start()

    def _write(self, first: int, last: int) -> None:
        assert self._profile is not None
        profile, self._profile = self._profile, None
        profile.stop()
        path = self._run_dir / FOLDER_NAME / f"steps-{first}-{last}-rank-{self._rank}.json.gz"
        path.parent.mkdir(exist_ok=True)
        profile.export_chrome_trace(str(path))
        logger.info("trace of steps %d to %d in %s; open it in ui.perfetto.dev", first, last, path)
