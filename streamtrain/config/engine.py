"""The ``teacher``, ``optim`` and ``engine`` sections."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from streamtrain.config.model import ModelConfig
from streamtrain.config.section import NonNegative, PathText, Positive, Section, Size, accept, fixed, free


class TeacherConfig(Section):
    """The network that computes the targets: the EMA of the student, or a frozen teacher.

    A frozen teacher is the latest checkpoint of another run with the same heads, or a feature teacher: a backbone
    without heads, of any size. Its student gets unmasked crops and learns from all patches; the EMA is updated as well.
    A linear projector maps the student's features to the width of a feature teacher.
    """

    kind: Literal["ema", "frozen"] = accept("ema", "The network that computes the targets.")
    weights: PathText | None = accept(
        None, "Frozen teacher (required with kind: frozen): a run directory, or a backbone as in init.weights."
    )
    model: dict[str, Any] | None = fixed(
        None, "Model section of a feature teacher; null: read from weights, unless these are a run directory."
    )
    loss: Literal["cosine", "smooth_l1"] = accept(
        "cosine", "Loss of a feature teacher's student: 1 - cosine, or smooth L1 to each teacher token standardised."
    )
    projector_layers: Positive = fixed(1, "Linear layers of the projector, with GELU between them.")
    projector_hidden: Positive | None = fixed(
        None, "Hidden width of a projector of several layers; null: the feature teacher's width."
    )
    chunk: NonNegative = free(0, "Images per forward pass of the teacher; 0: all images at once.")
    average: Literal["device", "host"] = free(
        "device", "Memory that holds the fp32 EMA; no difference on a CPU. Affects memory and speed."
    )

    @model_validator(mode="after")
    def _check_weights(self) -> TeacherConfig:
        if self.kind != "frozen" and self.weights is not None:
            raise ValueError("weights has an effect only with kind: frozen")
        if self.model is not None:
            ModelConfig.model_validate(self.model)
        is_default = self.loss == "cosine" and self.projector_layers == 1
        if self.kind == "ema" and not is_default:
            raise ValueError("loss and projector_layers have an effect only with kind: frozen")
        if self.projector_hidden is not None and self.projector_layers == 1:
            raise ValueError("projector_hidden has an effect only with projector_layers above 1")
        return self

    @property
    def backbone(self) -> ModelConfig | None:
        """The feature teacher's backbone; None: the teacher has the heads of its run."""
        return None if self.model is None else ModelConfig.model_validate(self.model)


class OptimConfig(Section):
    """AdamW and its parameter groups. Learning rate and weight decay are in ``schedules``."""

    betas: tuple[float, float] = accept((0.9, 0.999), "AdamW's decay rates of the first and second moment.")
    eps: float = accept(1e-8, "AdamW's epsilon.", gt=0.0)
    clip: float = accept(3.0, "Maximum L2 norm of the gradient; 0: no clipping.", ge=0.0)
    clip_per: Literal["global", "module"] = accept(
        "global", "Clip the norm over all parameters, or the norm of each module (backbone and each head)."
    )
    lr_scaling: Literal["none", "sqrt", "linear"] = accept(
        "none", "Scale schedules.lr by the ratio of the global batch to lr_reference_batch, or by its square root."
    )
    lr_reference_batch: Positive | None = accept(None, "Global batch for which schedules.lr is given.")
    layer_decay: float = accept(
        0.9, "Learning-rate factor of each block relative to the block above it.", gt=0.0, le=1.0
    )
    patch_embed_lr: float = accept(0.2, "Additional learning-rate factor of the patch embedding.", gt=0.0)

    @model_validator(mode="after")
    def _reject_ineffective_keys(self) -> OptimConfig:
        if (self.lr_scaling == "none") != (self.lr_reference_batch is None):
            raise ValueError("lr_scaling: sqrt or linear and lr_reference_batch must be set together")
        if self.clip_per == "module" and not self.clip:
            raise ValueError("clip_per: module has no effect with clip: 0")
        return self

    def lr_factor(self, global_batch: int) -> float:
        """Return the factor of ``schedules.lr`` for this batch."""
        if self.lr_reference_batch is None:
            return 1.0
        ratio = global_batch / self.lr_reference_batch
        return ratio**0.5 if self.lr_scaling == "sqrt" else ratio


class EngineConfig(Section):
    """Devices, precision, memory and speed. Only ``dtype`` and ``fp8`` affect results beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = free("auto", "Device type; auto: a GPU if there is one.")
    dtype: Literal["auto", "bf16", "fp32"] = accept(
        "auto", "Data type of the computation; auto: bf16 if the device multiplies bf16 natively, else fp32. On "
        "resume the resolved types are compared.",
    )  # fmt: skip
    fp8: bool = accept(
        False, "With bf16: run the blocks' linear layers as FP8 matmuls (GPU of compute capability 8.9 or newer)."
    )
    checkpointing: Literal["none", "selective", "block"] = free(
        "block", "Activations to recompute in the backward pass: none, each block's MLP (selective), or whole blocks."
    )
    compile: bool | Literal["auto"] = free(
        "auto", "Compile the blocks with torch.compile; auto: on a GPU only, because a CPU gains nothing from it."
    )
    view_groups: Positive = free(
        1, "Number of groups of images in which a branch is recomputed, one at a time: less memory, more time."
    )
    offload_checkpoints: bool = free(
        False, "Keep the inputs of recomputed blocks in host memory (with checkpointing: block; no effect on a CPU)."
    )
    deterministic: bool = free(
        False, "Use only deterministic GPU operations (slower), so that a run repeats and resumes bit for bit on the "
        "same GPUs and software. A CPU always does.",
    )  # fmt: skip
    moments: Literal["device", "8bit", "host", "disk"] = free(
        "device", "AdamW's moments: fp32 on the device, 8-bit on the device, fp32 in host memory, or fp32 in files."
    )
    moments_ratio: float = free(
        1.0, "Share of the moments that is moved to host memory or disk (moments: host or disk).", gt=0.0, le=1.0
    )
    moments_dir: PathText | None = free(None, "Folder of the files (moments: disk); null: run.dir/moments.")
    live_blocks: Positive = free(3, "Maximum gathered ZeRO-3 parameters, in backbone blocks.")
    reduce_bucket_bytes: Size = free(
        64 * 2**20, "Bytes of gradients that are reduced together (more than one rank).", ge=2**16
    )
    cpu_threads: NonNegative = free(0, "Torch threads per rank on a CPU; 0: the rank's share of the available cores.")
    cpu_kernels: bool = free(
        True, "Use streamtrain's CPU kernels for blocks and prototypes if the processor and the sizes allow it and "
        "every rank has a compiler. Affects speed, memory and rounding.",
    )  # fmt: skip
    environment: list[str] = free(
        [], "Additional environment variables to send to the other machines with train --hostfile; * matches any "
        "characters.",
    )  # fmt: skip
    collective_timeout_seconds: float = free(
        1800.0, "Seconds after which a rank that waits in a collective operation exits with an error.", gt=0.0
    )
    hang_timeout_seconds: float = free(
        3600.0, "Seconds without a new micro-batch or evaluation batch after which a rank exits; 0: never.", ge=0.0
    )

    def compiles(self, *, on_gpu: bool) -> bool:
        """Whether blocks are compiled on a GPU or on a CPU."""
        return on_gpu if self.compile == "auto" else self.compile

    @model_validator(mode="after")
    def _reject_ineffective_keys(self) -> EngineConfig:
        if self.moments_ratio != 1.0 and self.moments not in ("host", "disk"):
            raise ValueError(f"moments_ratio has an effect only with moments: host or disk, not {self.moments}")
        if self.moments_dir is not None and self.moments != "disk":
            raise ValueError(f"moments_dir has an effect only with moments: disk, not {self.moments}")
        if self.fp8 and self.dtype == "fp32":
            raise ValueError("fp8 needs bf16 for all other operations; use dtype: bf16 or auto")
        if self.view_groups > 1 and self.checkpointing == "none":
            raise ValueError("view_groups has an effect only with checkpointing: selective or block")
        if self.offload_checkpoints and self.checkpointing != "block":
            raise ValueError("offload_checkpoints has an effect only with checkpointing: block")
        return self
