"""Skipping the dropped images gives the same result as computing and masking them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamtrain.config.model import ModelConfig
from streamtrain.model.initialise import initialise
from streamtrain.model.layers import Block
from streamtrain.model.layout import Group, Layout, draw_drop_path
from streamtrain.model.rope import Rope
from streamtrain.model.vit import VisionTransformer

CONFIG = ModelConfig.model_validate({"dim": 16, "num_heads": 2, "num_registers": 1, "layerscale": 0.5})


@settings(max_examples=25, deadline=None)
@given(
    images=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    rate=st.floats(0.01, 0.95),
    seed=st.integers(0, 2**31),
)
def test_kept_images_equal_the_masked_reference(images: list[int], rate: float, seed: int) -> None:
    layout = Layout(tuple(Group(count, (2, 1 + index)) for index, count in enumerate(images)), 2)
    generator = torch.Generator().manual_seed(seed)
    (drop,) = draw_drop_path(layout, 1, rate, generator, torch.device("cpu"))
    block = Block(CONFIG).double()
    for parameter in block.parameters():
        parameter.data.normal_(0.0, 0.5, generator=generator)
    tables = [Rope(CONFIG).table(group.grid, torch.device("cpu"), torch.float64, None) for group in layout.groups]
    tokens = torch.randn(layout.offset(len(images)), 16, dtype=torch.float64, generator=generator)
    tokens.requires_grad_()
    grad = torch.randn(tokens.shape, dtype=torch.float64, generator=generator)

    factors = []
    for branch in (0, 1):
        factor = torch.zeros(len(tokens), 1, dtype=torch.float64)
        for index, group in enumerate(layout.groups):
            kept = max(1, round((1 - rate) * group.images))
            start, length = layout.offset(index), layout.length(index)
            rows = drop.rows[branch]
            mine = rows[(rows >= start) & (rows < layout.offset(index + 1))]
            assert len(mine) == kept * length
            factor[mine] = group.images / kept
        factors.append(factor)
    expected = tokens + factors[0] * (block.attend(tokens, layout, tables, None) - tokens)
    expected = expected + factors[1] * (block.refine(expected, layout, None, None) - expected)
    (expected_grad,) = torch.autograd.grad(expected, tokens, grad)

    got = block(tokens, layout, tables, drop)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, tokens, grad)[0], expected_grad)


def test_every_block_and_branch_draws_different_images() -> None:
    layout = Layout((Group(64, (1, 1)),), 1)
    drops = draw_drop_path(layout, 3, 0.5, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert len({tuple(rows.tolist()) for drop in drops for rows in drop.rows}) == 6
    assert all(drop.layout.groups[0].images == 32 for drop in drops)


def test_each_image_is_kept_with_the_same_probability() -> None:
    layout = Layout((Group(10, (1, 1)),), 0)
    drops = draw_drop_path(layout, 2000, 0.3, torch.Generator().manual_seed(0), torch.device("cpu"))
    share = torch.stack([drop.rows for drop in drops]).flatten().bincount(minlength=10) / 4000
    assert (share - 0.7).abs().max() < 0.03


def test_without_a_generator_or_a_rate_nothing_is_dropped() -> None:
    config = CONFIG.model_copy(update={"depth": 1, "patch_size": 2, "drop_path": 0.0})
    model = VisionTransformer(config)
    initialise(model, config, 0)
    seen: list[object] = []
    model.blocks[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[3]))
    model([torch.randn(2, 3, 4, 4)], generator=torch.Generator())
    model.drop_rate = 0.5
    model([torch.randn(2, 3, 4, 4)])
    assert seen == [None, None]
