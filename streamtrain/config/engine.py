"""Teacher, optimiser and the ZeRO-3 engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from streamtrain.config.section import NonNegative, Positive, Section


class TeacherConfig(Section):
    """``teacher``: the exponential moving average of the student."""

    # images a forward chunk; 0: all at once (affects memory only)
    chunk: NonNegative = 0


class OptimConfig(Section):
    """``optim``: AdamW and its parameter groups; the learning rate and weight decay are in ``schedules``."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0.0)
    # maximum L2 norm of the gradient over all parameters; 0: no clipping
    clip: float = Field(default=3.0, ge=0.0)
    # learning-rate factor from one block to the one below it
    layer_decay: float = Field(default=0.9, gt=0.0, le=1.0)
    # further learning-rate factor of the patch embedding
    patch_embed_lr: float = Field(default=0.2, gt=0.0)


class EngineConfig(Section):
    """``engine``: how the step is computed; ``dtype`` alone affects results beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    # auto: bf16 where the device multiplies it natively, else fp32
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    # recompute a block's activations in the backward
    checkpointing: Literal["none", "block"] = "block"
    # un-sharded parameters that may be alive at once, in blocks of the backbone
    live_blocks: Positive = 3
    reduce_bucket_bytes: int = Field(default=256 * 2**20, ge=2**16)
    # torch threads of a rank on CPU; 0: the cores of this machine divided by its ranks
    cpu_threads: NonNegative = 0
