"""Ranks of which the last one cannot compile the kernels: what each of them then uses within a run."""

from __future__ import annotations

import os
import sys

if os.environ["RANK"] == "1":
    os.environ |= {"CXX": "/nonexistent/c++", "TORCH_EXTENSIONS_DIR": sys.argv[1]}

from streamtrain.config.engine import EngineConfig
from streamtrain.engine.runtime import Launch, joined
from streamtrain.kernels.build import found, usable

with joined(EngineConfig(device="cpu"), Launch.from_environment()):
    print(found(), usable())
