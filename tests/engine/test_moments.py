"""AdamW gives the same result with every moment storage; storage sizes; reading and writing any span."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.config.engine import EngineConfig, OptimConfig
from streamtrain.engine import moments as moments_module
from streamtrain.engine.moments import (
    BLOCK,
    KEYS,
    EightBitMoments,
    FileMoments,
    Moments,
    SplitMoments,
    TensorMoments,
    moments_maker,
)
from streamtrain.engine.optim import AdamW, set_rates
from streamtrain.planning.parameter_groups import GroupRule

CPU = torch.device("cpu")
CONFIG = OptimConfig(betas=(0.9, 0.95))
TIERS = [
    {"moments": "device"},
    {"moments": "8bit"},
    {"moments": "host"},
    {"moments": "host", "moments_ratio": 0.4},
    {"moments": "disk"},
    {"moments": "disk", "moments_ratio": 0.7},
]
# neither is a multiple of a block; the first is below torchao's own minimum size for 8-bit states
NUMELS = (700, 20_011)


def train(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], steps: int) -> None:
    """Run steps with changing rates and gradients."""
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        set_rates(optimizer.param_groups, 1e-2 * (step + 1), 0.1 * step, last_layer_frozen=False)
        for parameter in parameters:
            parameter.grad = torch.randn(len(parameter), generator=generator) * 10.0 ** (step % 3)
        optimizer.step()


def make(engine: dict[str, object], folder: Path) -> tuple[AdamW, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    parameters = [torch.randn(numel, generator=generator).requires_grad_() for numel in NUMELS]
    rules = [GroupRule(0.5, True, False, True), GroupRule(1.0, False, False, False)]
    groups = [{"params": [p], "rule": rule} for p, rule in zip(parameters, rules, strict=True)]
    return AdamW(groups, CONFIG, moments_maker(EngineConfig(**engine), folder, CPU)), parameters


@pytest.mark.parametrize("tier", TIERS, ids=str)
def test_every_tier_equals_adamw(tier: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # several chunks per tensor
    monkeypatch.setattr(moments_module, "CHUNK", 4096)
    for store in (FileMoments, EightBitMoments):
        monkeypatch.setattr(store, "chunk", 4096)
    optimizer, parameters = make(tier, tmp_path)
    _, expected = make(tier, tmp_path / "other")
    groups = [{**group, "params": [p]} for group, p in zip(optimizer.param_groups, expected, strict=True)]
    start = [p.detach().clone() for p in parameters]
    train(optimizer, parameters, 5)
    train(torch.optim.AdamW(groups, betas=CONFIG.betas, eps=CONFIG.eps, fused=True), expected, 5)
    for got, want, before in zip(parameters, expected, start, strict=True):
        moved = (want - before).norm()
        deviation = float(((got - want).norm() / moved).detach())
        assert moved > 0.1 and deviation < (0.05 if tier["moments"] == "8bit" else 1e-6), deviation


def test_8bit_size_and_saved_state(tmp_path: Path) -> None:
    optimizer, parameters = make({"moments": "8bit"}, tmp_path)
    train(optimizer, parameters, 3)
    for parameter in parameters:
        moments = optimizer.moments(parameter)
        assert moments is not None
        blocks = -(-len(parameter) // BLOCK)
        assert moments.num_bytes() == 2 * blocks * (BLOCK + 4)
        again = EightBitMoments(len(parameter), CPU)
        for key in KEYS:
            again.write(key, 0, moments.read(key, 0, len(parameter)))
            assert torch.equal(again.codes[key], moments.codes[key])
            torch.testing.assert_close(again.scales[key], moments.scales[key], rtol=3e-7, atol=0.0)


def stores(numel: int, folder: Path) -> list[Moments]:
    return [
        TensorMoments(numel, CPU, CPU),
        FileMoments(numel, CPU, folder / "values"),
        EightBitMoments(numel, CPU),
        SplitMoments(TensorMoments(512, CPU, CPU), FileMoments(numel - 512, CPU, folder / "rest")),
    ]


@given(st.integers(0, 1999), st.integers(1, 2000), st.sampled_from(range(4)))
def test_any_span_can_be_written_and_read(
    tmp_path_factory: pytest.TempPathFactory, start: int, count: int, which: int
) -> None:
    stop = min(start + count, 2000)
    store = stores(2000, tmp_path_factory.mktemp("moments"))[which]
    values = torch.linspace(0.5, 1.0, stop - start)
    for key in KEYS:
        assert not store.read(key, 0, 2000).any()
        store.write(key, start, values)
        kept = store.read(key, 0, 2000)
        torch.testing.assert_close(kept[start:stop], values, rtol=0.05 if which == 2 else 0.0, atol=0.0)
        assert not kept[:start].any() and not kept[stop:].any()


def test_file_sizes(tmp_path: Path) -> None:
    optimizer, parameters = make({"moments": "disk"}, tmp_path)
    train(optimizer, parameters, 1)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert sum(sizes) == 2 * 4 * sum(NUMELS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"moments_ratio": 0.5},
        {"moments": "8bit", "moments_ratio": 0.5},
        {"moments": "host", "moments_dir": "x"},
        {"checkpointing": "none", "view_groups": 2},
        {"checkpointing": "selective", "offload_checkpoints": True},
    ],
)
def test_key_without_effect_is_an_error(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="has an effect only with"):
        EngineConfig(**wrong)
