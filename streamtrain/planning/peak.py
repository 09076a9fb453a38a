"""Peak FLOP/s of devices, from their data sheets, for model FLOPs utilisation (MFU)."""

from __future__ import annotations

# Substring of CUDA's device name (more specific ones first), dense bf16 FLOP/s, and fp32 FLOP/s without TF32, as torch
# computes by default.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    ("GB200", 2500e12, 80e12),
    ("B200", 2250e12, 75e12),
    ("GH200", 989.4e12, 66.9e12),
    ("H200", 989.4e12, 66.9e12),
    ("H100 NVL", 835.5e12, 60e12),
    ("H100 PCIe", 756e12, 51.2e12),
    ("H100", 989.4e12, 66.9e12),
    ("H800", 989.4e12, 66.9e12),
    ("H20", 148e12, 44e12),
    ("A100", 312e12, 19.5e12),
    ("A800", 312e12, 19.5e12),
    ("A40", 149.7e12, 37.4e12),
    ("A30", 165e12, 10.3e12),
    ("A10G", 70e12, 31.5e12),
    ("A10", 125e12, 31.2e12),
    ("L40S", 362e12, 91.6e12),
    ("L40", 181e12, 90.5e12),
    ("L4", 121e12, 30.3e12),
    ("RTX A6000", 154.8e12, 38.7e12),
    ("RTX 6000 Ada", 364.2e12, 91.1e12),
    ("RTX 4090", 165.2e12, 82.6e12),
    ("RTX 3090", 71e12, 35.6e12),
)


def peak_flops(device_name: str, bf16: bool) -> float | None:
    """Return the peak FLOP/s of a device by CUDA's name for it; None if the table lacks it, as for every CPU."""
    # whole words: "A10" must not match "A100"
    words = f"{device_name} ".replace("-", " ")
    for part, peak, fp32 in _PEAKS:
        if f" {part} " in f" {words}":
            return peak if bf16 else fp32
    return None
