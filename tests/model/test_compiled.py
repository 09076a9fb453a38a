"""A compiled block gives the same results as an eager one."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from streamtrain.config.model import ModelConfig
from streamtrain.errors import ConfigError
from streamtrain.model.compiled import compile_blocks
from streamtrain.model.initialise import initialise
from streamtrain.model.vit import VisionTransformer

CONFIG = ModelConfig(patch_size=4, dim=16, depth=2, num_heads=2, layerscale=0.5, drop_path=0.4, rope_rescale=2.0)


def network(device: str = "cpu") -> VisionTransformer:
    made = VisionTransformer(CONFIG, "block")
    initialise(made, CONFIG, 0)
    return made.to(device)


def crops(device: str = "cpu") -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, side, side, generator=draw).to(device) for n, side in ((5, 16), (4, 8))]


@pytest.mark.parametrize(
    ("device", "backend"),
    # aot_eager captures the graph and its gradient but generates no code, which is slow
    [
        ("cpu", "aot_eager"),
        pytest.param("cpu", "inductor", marks=pytest.mark.slow),
        pytest.param("cuda", "inductor", marks=pytest.mark.gpu),
    ],
)
def test_results_equal_those_of_an_eager_block_and_each_shape_is_compiled_once(
    device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, compiled = network(device), network(device)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    compile_blocks(compiled)
    counters = torch._dynamo.utils.counters
    counters.clear()
    for seed in range(4):
        if seed == 1:
            torch.compiler.set_stance("fail_on_recompile")
        found = []
        for each in (plain, compiled):
            each.zero_grad()
            images, draw = crops(device), torch.Generator(device).manual_seed(seed)
            # the masked positions change from step to step, their number does not
            rows = torch.arange(0, 85, 9, device=device) + seed
            tokens, _ = each.encode(images, [None, None], draw, rows=rows)
            tokens.square().sum().backward()
            with torch.no_grad():
                found.append(each.encode(images, [None, None], chunk=3, rows=rows)[0])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
        expected = dict(plain.named_parameters())
        for name, parameter in compiled.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-4, msg=name)
    # the student's blocks and its last block; for a whole and a partial chunk of either size, the teacher's blocks and
    # its last attention branch; its last MLP branch
    assert counters["stats"]["unique_graphs"] == 2 + 2 * 2 * 2 + 1 and not counters["graph_break"]


@pytest.fixture(autouse=True)
def _reset() -> object:
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def test_a_machine_that_cannot_compile_gives_a_short_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    made = network()
    compile_blocks(made)
    with pytest.raises(ConfigError, match=r"set engine\.compile=off") as found:
        made.encode(crops(), [None, None])
    assert "\n" not in str(found.value)
