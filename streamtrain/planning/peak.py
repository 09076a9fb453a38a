"""Rates of GPUs, from their data sheets: peak FLOP/s, memory and link bandwidth."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one device; FLOP/s are dense (without sparsity)."""

    # part of CUDA's device name
    name: str
    bf16: float
    # without TF32, as torch computes by default
    fp32: float
    # 0: no FP8 matmuls
    fp8: float
    # bytes/s of device memory, and bytes/s in one direction to the other GPUs of a host (NVLink, or PCIe)
    memory: float
    link: float
    # bytes of device memory, as in the card's name
    capacity: int

    @property
    def option(self) -> str:
        """The name for ``streamtrain plan --gpu``."""
        return self.name.lower().replace(" ", "")


# More specific names first. TFLOP/s in bf16, fp32, FP8; memory TB/s; link GB/s; GB.
_TABLE: tuple[tuple[str, float, float, float, float, float, int], ...] = (
    ("GB200", 2500, 80, 5000, 8.0, 900, 186),
    ("B200", 2250, 75, 4500, 8.0, 900, 180),
    ("GH200", 989.4, 66.9, 1979, 4.0, 450, 96),
    ("H200", 989.4, 66.9, 1979, 4.8, 450, 141),
    ("H100 NVL", 835.5, 60, 1671, 3.94, 64, 94),
    ("H100 PCIe", 756, 51.2, 1513, 2.04, 64, 80),
    ("H100", 989.4, 66.9, 1979, 3.35, 450, 80),
    ("H800", 989.4, 66.9, 1979, 3.35, 200, 80),
    ("H20", 148, 44, 296, 4.0, 450, 96),
    ("A100", 312, 19.5, 0, 2.04, 300, 80),
    ("A800", 312, 19.5, 0, 2.04, 200, 80),
    ("A40", 149.7, 37.4, 0, 0.696, 32, 48),
    ("A30", 165, 10.3, 0, 0.933, 32, 24),
    ("A10G", 70, 31.5, 0, 0.6, 32, 24),
    ("A10", 125, 31.2, 0, 0.6, 32, 24),
    ("L40S", 362, 91.6, 733, 0.864, 32, 48),
    ("L40", 181, 90.5, 362, 0.864, 32, 48),
    ("L4", 121, 30.3, 242, 0.3, 32, 24),
    ("RTX A6000", 154.8, 38.7, 0, 0.768, 32, 48),
    ("RTX 6000 Ada", 364.2, 91.1, 728.5, 0.96, 32, 48),
    ("RTX 4090", 165.2, 82.6, 330.3, 1.01, 32, 24),
    ("RTX 3090", 71, 35.6, 0, 0.936, 32, 24),
)

GPUS: tuple[Gpu, ...] = tuple(
    Gpu(name, bf16 * 1e12, fp32 * 1e12, fp8 * 1e12, memory * 1e12, link * 1e9, capacity * 10**9)
    for name, bf16, fp32, fp8, memory, link, capacity in _TABLE
)


def gpu_of_option(text: str) -> Gpu:
    """Return the GPU of an option such as ``h100`` or ``rtx4090``.

    Raises:
        ValueError: for an unknown name.
    """
    for gpu in GPUS:
        if gpu.option == text.lower().replace(" ", "").replace("-", ""):
            return gpu
    raise ValueError(f"{text!r} is unknown; choose one of {', '.join(gpu.option for gpu in GPUS)}")


def gpu_of_device(name: str) -> Gpu | None:
    """Return the GPU by CUDA's name for a device; None if the table lacks it, as for every CPU."""
    # whole words: "A10" must not match "A100"
    words = f" {name} ".replace("-", " ")
    return next((gpu for gpu in GPUS if f" {gpu.name} " in words), None)


def peak_flops(device_name: str, bf16: bool) -> float | None:
    """Return the peak FLOP/s of a device by CUDA's name for it; None if unknown."""
    gpu = gpu_of_device(device_name)
    if gpu is None:
        return None
    return gpu.bf16 if bf16 else gpu.fp32
