"""Settings of every test: no time limit on a single hypothesis example, one thread a process."""

from __future__ import annotations

import os

from hypothesis import settings

# Small tensors are faster on one thread, and tests that start ranks would otherwise fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("house", deadline=None)
settings.load_profile("house")
