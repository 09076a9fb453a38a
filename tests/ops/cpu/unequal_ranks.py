"""FOLDER KEY: what ranks use within a run with engine.cpu_kernels=KEY, of whom the second cannot compile them."""

from __future__ import annotations

import os
import sys

if os.environ["RANK"] == "1":
    os.environ |= {"CXX": "/nonexistent/c++", "TORCH_EXTENSIONS_DIR": sys.argv[1]}

from streamtrain.config.engine import EngineConfig
from streamtrain.engine.runtime import Launch, init_process_group
from streamtrain.ops.cpu.build import found, usable

with init_process_group(EngineConfig(device="cpu", cpu_kernels=sys.argv[2]), Launch.from_environment()) as runtime:
    print(found(runtime.dtype), usable(runtime.dtype))
