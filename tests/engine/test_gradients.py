"""Each module's gradient is clipped separately, however it is sharded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from joined_processes import run_on_ranks

from streamtrain.engine.gradients import ModuleClipping

LIMIT = 0.5
SIZES = {"backbone.a": 6, "head.b": 4, "backbone.c": 8, "other.d": 2}


def clipped_as_torch_does(gradients: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return every module's gradients after ``clip_grad_norm_``, and the norms before."""
    expected, norms = {}, {}
    for module in ("backbone", "head", "other"):
        parameters = {}
        for name, gradient in gradients.items():
            if name.startswith(module):
                parameters[name] = torch.nn.Parameter(torch.zeros_like(gradient))
                parameters[name].grad = gradient.clone()
        norms[module] = float(torch.nn.utils.clip_grad_norm_(parameters.values(), LIMIT))
        expected |= {name: parameter.grad for name, parameter in parameters.items()}
    return expected, norms


def clip_on_rank(rank: int, world_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    gradients = {name: torch.randn(size, generator=generator) for name, size in SIZES.items()}
    # one module stays below the limit
    gradients["other.d"] *= 0.01
    parameters = {name: torch.nn.Parameter(torch.zeros(size)) for name, size in SIZES.items()}
    shards = {name: gradient.chunk(world_size)[rank].clone() for name, gradient in gradients.items()}
    clipping = ModuleClipping(parameters, LIMIT)
    clipping.apply((parameters[name], shard) for name, shard in shards.items())
    expected, norms = clipped_as_torch_does(gradients)
    for name, shard in shards.items():
        torch.testing.assert_close(shard, expected[name].chunk(world_size)[rank])
    assert torch.equal(shards["other.d"], gradients["other.d"].chunk(world_size)[rank])
    assert {module: float(norm) for module, norm in clipping.norms.items()} == pytest.approx(norms)


@pytest.mark.parametrize("ranks", [1, 2])
def test_module_clipping_matches_torch(ranks: int, tmp_path: Path) -> None:
    run_on_ranks(clip_on_rank, tmp_path, ranks, ranks=ranks)
