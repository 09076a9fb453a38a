"""Settings of torch's allocator of GPU memory, which it reads from the environment before its first allocation."""

from __future__ import annotations

import os

from streamtrain.run.machine import has_gpu_driver

# torch 2.11 to 2.13 read the first name; the others are its names for NVIDIA and AMD GPUs, which take precedence
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
# Segments that grow avoid the fragments that allocations of many sizes leave, such as gathered parameters.
DEFAULT = "expandable_segments:True"


def set_allocator_defaults() -> None:
    """Let torch's allocator of GPU memory use expandable segments, unless the user has set one of its variables.

    Call it before torch is imported; processes that are started later inherit the variable.
    """
    if has_gpu_driver() and not any(name in os.environ for name in VARIABLES):
        os.environ[VARIABLES[0]] = DEFAULT
