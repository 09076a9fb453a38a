"""Teacher, optimiser and the ZeRO-3 engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from streamtrain.config.section import NonNegative, Positive, Section


class TeacherConfig(Section):
    """``teacher``: the exponential moving average of the student, which a run always keeps, and who teaches.

    A ``frozen`` teacher is the newest checkpoint's of another run, whose model and heads it has. Its student sees
    unmasked crops and learns from all their patches; the average of it follows ``schedules.momentum`` all the same.
    """

    kind: Literal["ema", "frozen"] = "ema"
    # with kind: frozen, the folder of that run
    weights: str | None = None
    # images a forward chunk; 0: all at once (affects memory only)
    chunk: NonNegative = 0
    # where the fp32 averages lie; on a CPU both are the same (affects memory and speed only)
    average: Literal["device", "host"] = "device"

    @model_validator(mode="after")
    def _weights_where_frozen(self) -> TeacherConfig:
        if (self.kind == "frozen") != (self.weights is not None):
            raise ValueError("kind: frozen and weights (the folder of a run) need each other")
        return self


class OptimConfig(Section):
    """``optim``: AdamW and its parameter groups; the learning rate and weight decay are in ``schedules``."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0.0)
    # maximum L2 norm of the gradient; 0: no clipping
    clip: float = Field(default=3.0, ge=0.0)
    # the norm over all parameters, or of each module (the backbone, each head) on its own
    clip_per: Literal["global", "module"] = "global"
    # how schedules.lr, which is meant for a batch of lr_reference_batch, follows the global batch
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"
    lr_reference_batch: Positive | None = None
    # learning-rate factor from one block to the one below it
    layer_decay: float = Field(default=0.9, gt=0.0, le=1.0)
    # further learning-rate factor of the patch embedding
    patch_embed_lr: float = Field(default=0.2, gt=0.0)

    @model_validator(mode="after")
    def _consistent(self) -> OptimConfig:
        if (self.lr_scaling == "none") != (self.lr_reference_batch is None):
            raise ValueError("lr_scaling: sqrt or linear and lr_reference_batch need each other")
        if self.clip_per == "module" and not self.clip:
            raise ValueError("clip_per: module has no effect with clip: 0")
        return self

    def lr_factor(self, global_batch: int) -> float:
        """What ``schedules.lr`` is multiplied by for this batch."""
        if self.lr_reference_batch is None:
            return 1.0
        ratio = global_batch / self.lr_reference_batch
        return ratio**0.5 if self.lr_scaling == "sqrt" else ratio


class EngineConfig(Section):
    """``engine``: how the step is computed; ``dtype`` and ``fp8`` alone affect results beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    # auto: bf16 where the device multiplies it natively, else fp32
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    # with bf16, the blocks' matrix products in 8 bits, for a GPU that has such (compute capability 8.9)
    fp8: bool = False
    # what the backward recomputes: nothing, each block's MLP (its attention branch is kept), or each whole block
    checkpointing: Literal["none", "selective", "block"] = "block"
    # the blocks as compiled kernels: on, off, or auto: on a GPU, but not on a CPU, where it does not pay
    compile: bool | Literal["auto"] = "auto"
    # a block's branches recompute their images in so many groups, one after the other
    view_groups: Positive = 1
    # what is kept between recomputed blocks waits in host memory (on a CPU it is there anyway)
    offload_checkpoints: bool = False
    # AdamW's two moments: fp32 on the device, in 8 bits there, in host memory, or in files
    moments: Literal["device", "8bit", "host", "disk"] = "device"
    # share of the moments that is moved away, with moments: host or disk
    moments_ratio: float = Field(default=1.0, gt=0.0, le=1.0)
    # folder of the files, with moments: disk; null: run.dir/moments
    moments_dir: str | None = None
    # un-sharded parameters that may be alive at once, in blocks of the backbone
    live_blocks: Positive = 3
    # of several ranks; one has nothing to reduce
    reduce_bucket_bytes: int = Field(default=64 * 2**20, ge=2**16)
    # torch threads of a rank on CPU; 0: the cores of this machine divided by its ranks
    cpu_threads: NonNegative = 0
    # on a CPU, blocks and prototypes by kernels of our own, where the processors and the sizes allow it and all ranks
    # have a compiler at hand (affects speed, memory and rounding only)
    cpu_kernels: bool = True
    # a rank that waits so long for another one in a collective operation ends
    collective_timeout_seconds: float = Field(default=1800.0, gt=0.0)
    # a rank that gets no further within a micro-batch or between two of them for so long ends; 0: never
    hang_timeout_seconds: float = Field(default=3600.0, ge=0.0)

    def compiles(self, *, on_gpu: bool) -> bool:
        """Whether blocks are compiled on such a device."""
        return on_gpu if self.compile == "auto" else self.compile

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> EngineConfig:
        if self.moments_ratio != 1.0 and self.moments not in ("host", "disk"):
            raise ValueError(f"moments_ratio has an effect only with moments: host or disk, not {self.moments}")
        if self.moments_dir is not None and self.moments != "disk":
            raise ValueError(f"moments_dir has an effect only with moments: disk, not {self.moments}")
        if self.fp8 and self.dtype == "fp32":
            raise ValueError("fp8 needs bf16 beside it; use dtype: bf16 or auto")
        if self.view_groups > 1 and self.checkpointing == "none":
            raise ValueError("view_groups has an effect only with checkpointing: selective or block")
        if self.offload_checkpoints and self.checkpointing != "block":
            raise ValueError("offload_checkpoints has an effect only with checkpointing: block")
        return self
