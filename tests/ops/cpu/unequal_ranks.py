"""FOLDER KEY: print whether a rank can and does use kernels with engine.cpu_kernels=KEY; rank 1 cannot compile them."""

from __future__ import annotations

import os
import sys

if os.environ["RANK"] == "1":
    os.environ |= {"CXX": "/nonexistent/c++", "TORCH_EXTENSIONS_DIR": sys.argv[1]}

from streamtrain.config.engine import EngineConfig
from streamtrain.engine.runtime import Launch, init_process_group
from streamtrain.ops.cpu.build import is_enabled, load

with init_process_group(EngineConfig(device="cpu", cpu_kernels=sys.argv[2]), Launch.from_environment()) as runtime:
    print(load(runtime.dtype), is_enabled(runtime.dtype))
