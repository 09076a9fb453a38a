"""Our parameter names and those of the published families: DINOv3's own, transformers', timm's.

Only names and the cutting of tensors differ; every conversion is exact in both directions. A key bias, which RoPE lets
move the scores, goes along; whoever writes for a family whose models have none refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from math import isqrt

import torch
from torch import Tensor

from streamtrain.errors import StreamtrainError
from streamtrain.interop.families import DINOV3, HF, TIMM, Naming

QKV_BIAS = "attention.qkv.bias"


def to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's state under the names of a saved ``DINOv3ViTModel``; the norm of local crops has no place there."""
    return _export(state, HF)


def from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our backbone's state from that of a ``DINOv3ViTModel``, saved or live."""
    return convert(state, HF)[0]


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's state under timm's names, which have no place for the mask token and the norm of local crops."""
    return _export(state, TIMM)


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our backbone's state from that of one of timm's DINOv3 models."""
    return convert(state, TIMM)[0]


def from_dinov3(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our backbone's state from one with the names of DINOv3's own checkpoints."""
    return convert(state, DINOV3)[0]


def detect(state: Mapping[str, Tensor]) -> Naming | None:
    """The family that ``state`` is named after; None for our own names.

    Raises:
        StreamtrainError: if it is none of them.
    """
    marks = {".layer_scale1.lambda1": HF, ".gamma_1": TIMM, ".ls1.gamma": DINOV3, ".scale1.gamma": None}
    for mark, naming in marks.items():
        if any(name.endswith(mark) for name in state):
            return naming
    raise StreamtrainError(
        f"none of the {len(state)} tensors bears a name of a vision transformer of transformers, timm, DINOv3 or ours"
    )


def convert(state: Mapping[str, Tensor], naming: Naming | None) -> tuple[dict[str, Tensor], list[str]]:
    """``state`` under our names, and what of it has none; a prefix such as ``backbone.`` is taken off."""
    origins, unexpected = find_origins(state, naming)
    found = {ours: combine(ours, [state[name] for name in theirs], naming) for ours, theirs in origins.items()}
    return found, unexpected


def find_origins(names: Iterable[str], naming: Naming | None) -> tuple[dict[str, list[str]], list[str]]:
    """For each of our names those of ``names`` that ``combine`` makes it from, and the names without a place."""
    names = list(names)
    anchor = "embedding.cls_token" if naming is None else naming.fixed["embedding.cls_token"]
    prefix = min((name for name in names if f".{name}".endswith(f".{anchor}")), key=len, default=anchor)
    prefix = prefix.removesuffix(anchor)
    inner = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    unexpected = [name for name in names if not name.startswith(prefix)]
    if naming is None:
        return {ours: [name] for ours, name in inner.items()}, unexpected
    # transformers' live model keeps its blocks one level deeper than its files
    inner = {re.sub(rf"^model\.(?={re.escape(naming.block)}\d)", "", short): name for short, name in inner.items()}
    origins = {ours: [inner.pop(name) for name in theirs] for ours, theirs in list(_pairs(inner, naming))}
    unexpected += [name for short, name in inner.items() if not re.match(naming.ignored, short)]
    return origins, unexpected


def _export(state: Mapping[str, Tensor], naming: Naming) -> dict[str, Tensor]:
    """``state`` under ``naming``; tensors without a place there are left out."""
    dim = state["embedding.cls_token"].shape[-1]
    suffixes = naming.suffixes(swiglu="blocks.0.mlp.gate_up.weight" in state)
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in naming.fixed:
            if not value.numel() and naming is not HF:
                # without registers only transformers has a tensor for them
                continue
            result[naming.fixed[name]] = _outward(name, value)
            continue
        block = re.match(r"blocks\.(\d+)\.(.+)", name)
        if block is None:
            continue
        start, suffix = f"{naming.block}{block[1]}.", block[2]
        if suffix == QKV_BIAS:
            pieces = (value[:dim], value[dim:-dim], value[-dim:])
            result |= {start + theirs: piece for theirs, piece in zip(naming.bias, pieces, strict=True) if len(piece)}
        else:
            names = suffixes[suffix]
            for theirs, piece in zip(names, value.chunk(len(names)), strict=True):
                result[start + theirs] = piece
    return result


def _outward(name: str, value: Tensor) -> Tensor:
    """Their shape of one of the tensors outside the blocks."""
    if name.endswith("projection.weight"):
        side = isqrt(value.shape[1] // 3)
        return value.reshape(value.shape[0], 3, side, side)
    if name.endswith(("_token", "_tokens")):
        return value[None]
    return value


def _pairs(state: Mapping[str, str], naming: Naming) -> Iterator[tuple[str, list[str]]]:
    """Ours, and the names of theirs that make it up, for all that ``state`` has in full."""
    for ours, theirs in naming.fixed.items():
        if theirs in state:
            yield ours, [theirs]
    indices = sorted({int(m[1]) for m in (re.match(rf"{re.escape(naming.block)}(\d+)\.", n) for n in state) if m})
    for index in indices:
        start = f"{naming.block}{index}."
        gate = start + naming.swiglu["mlp.gate_up.weight"][0]
        for ours, parts in naming.suffixes(swiglu=gate in state).items():
            if all(start + part in state for part in parts):
                yield f"blocks.{index}.{ours}", [start + part for part in parts]
        biases = [start + part for part in naming.bias if start + part in state]
        if biases:
            yield f"blocks.{index}.{QKV_BIAS}", biases


def combine(ours: str, pieces: list[Tensor], naming: Naming | None) -> Tensor:
    """Our tensor from those of the family ``naming`` that make it up."""
    if naming is None:
        return pieces[0]
    value = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    if ours.endswith(QKV_BIAS) and len(pieces) == 1:
        # the family masks the key part of its fused bias: whatever stands there counts as 0
        query, _, rest = value.chunk(3)
        return torch.cat([query, rest])
    if ours == "embedding.projection.weight":
        return value.flatten(1)
    if ours in ("embedding.cls_token", "embedding.register_tokens", "embedding.mask_token"):
        return value.reshape(-1, value.shape[-1])
    return value
