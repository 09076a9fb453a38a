"""A trace of some steps on demand, for ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

from pathlib import Path

import torch

from streamtrain.config.monitor import ProfileConfig

FOLDER_NAME = "profile"


class Profiler:
    """Traces the steps of ``monitor.profile`` on this rank; costs nothing before and after them."""

    def __init__(self, run_dir: Path, config: ProfileConfig, rank: int) -> None:
        self._run_dir, self._config, self._rank = run_dir, config, rank
        self._profile: torch.profiler.profile | None = None

    def begin(self, step: int) -> None:
        """Call before ``step`` (from 1) begins."""
        if step == self._config.start:
            self._profile = torch.profiler.profile(activities=_activities())
            self._profile.start()

    def end(self, step: int) -> str | None:
        """Call after it; returns what to say once the trace is written."""
        if self._profile is None or self._config.start is None or step < self._config.start + self._config.steps - 1:
            return None
        profile, self._profile = self._profile, None
        profile.stop()
        path = self._run_dir / FOLDER_NAME / f"steps-{self._config.start}-{step}-rank-{self._rank}.json.gz"
        try:
            path.parent.mkdir(exist_ok=True)
            profile.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            return f"the trace could not be written: {error}"
        return f"trace of steps {self._config.start} to {step} in {path}; open it in ui.perfetto.dev"

    def close(self) -> None:
        """A run that ends within the window has no trace."""
        if self._profile is not None:
            self._profile.stop()


def _activities() -> list[torch.profiler.ProfilerActivity]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return activities
