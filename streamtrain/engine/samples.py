"""A few values of each part of a network, for histograms."""

from __future__ import annotations

from collections.abc import Iterable

import torch

# values that are taken of one parameter at most
PER_PARAMETER = 4096


def part_of(name: str) -> str:
    """What a parameter is counted with: ``embedding``, ``block_03``, ``norm``, ``patch_head``, ``patch_prototypes``."""
    head, _, rest = name.partition(".")
    if head != "backbone":
        return head.replace("_head", "_prototypes") if rest.startswith("prototypes") else head
    pieces = rest.split(".")
    return f"block_{int(pieces[1]):02d}" if pieces[0] == "blocks" else pieces[0]


def sampled(parts: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """fp32 values by part of the network, evenly spread over each of ``(parameter's name, values)``."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, values in parts:
        flat = values.detach().flatten()
        stride = -(-flat.numel() // PER_PARAMETER)
        if stride:
            found.setdefault(part_of(name), []).append(flat[::stride].float())
    return {part: torch.cat(pieces) for part, pieces in found.items()}
