"""The packed backbone against transformers' DINOv3, and against itself with checkpointing and chunking."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from streamtrain.config.model import ModelConfig
from streamtrain.model import layers
from streamtrain.model.initialise import initialise
from streamtrain.model.vit import VisionTransformer
from streamtrain.ops.branches import BranchRows

CPU = torch.device("cpu")
TINY = {"dim": 48, "depth": 3, "num_heads": 3, "patch_size": 4, "num_registers": 2, "drop_path": 0.0}


def make(checkpointing: str = "none", groups: int = 1, offload: bool = False, **fields: object) -> VisionTransformer:
    """Return a small model in which all branches matter (LayerScale near 1, no zero bias)."""
    config = ModelConfig.model_validate({**TINY, **fields})
    model = VisionTransformer(config, checkpointing, groups, offload)
    initialise(model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def published(model: VisionTransformer, config: ModelConfig) -> DINOv3ViTModel:
    """Return transformers' model with the same weights, mapped independently of the export."""
    reference = DINOv3ViTModel(
        DINOv3ViTConfig(
            patch_size=config.patch_size,
            hidden_size=config.dim,
            intermediate_size=config.hidden,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            hidden_act="silu" if config.mlp == "swiglu" else "gelu",
            use_gated_mlp=config.mlp == "swiglu",
            num_register_tokens=config.num_registers,
            query_bias=config.qkv_bias,
            key_bias=config.key_bias,
            value_bias=config.qkv_bias,
            layer_norm_eps=config.norm_eps,
            rope_theta=config.rope_base,
            layerscale_value=1.0,
            drop_path_rate=0.0,
            image_size=64,
        )
    ).eval()
    dim = config.dim
    ours = dict(model.named_parameters())
    theirs = dict(reference.named_parameters())

    def put(name: str, value: Tensor) -> None:
        parameter = theirs.pop(name)
        parameter.data.copy_(value.detach().reshape(parameter.shape))

    for token in ("cls_token", "register_tokens", "mask_token"):
        put(f"embeddings.{token}", ours.get(f"embedding.{token}", torch.empty(0)))
    for kind in ("weight", "bias"):
        put(f"embeddings.patch_embeddings.{kind}", ours[f"embedding.projection.{kind}"])
        put(f"norm.{kind}", ours[f"norm.{kind}"])
    for index in range(config.depth):
        us, them = f"blocks.{index}.", f"model.layer.{index}."
        for kind in ("weight", "bias"):
            put(f"{them}norm1.{kind}", ours[f"{us}norm1.{kind}"])
            put(f"{them}norm2.{kind}", ours[f"{us}norm2.{kind}"])
            put(f"{them}attention.o_proj.{kind}", ours[f"{us}attention.proj.{kind}"])
            put(f"{them}mlp.down_proj.{kind}", ours[f"{us}mlp.down.{kind}"])
            if config.mlp == "swiglu":
                gate, up = ours[f"{us}mlp.gate_up.{kind}"].split(config.hidden)
                put(f"{them}mlp.gate_proj.{kind}", gate)
                put(f"{them}mlp.up_proj.{kind}", up)
            else:
                put(f"{them}mlp.up_proj.{kind}", ours[f"{us}mlp.up.{kind}"])
        for name, value in zip("qkv", ours[f"{us}attention.qkv.weight"].split(dim), strict=True):
            put(f"{them}attention.{name}_proj.weight", value)
        if config.qkv_bias:
            names = "qkv" if config.key_bias else "qv"
            for name, value in zip(names, ours[f"{us}attention.qkv.bias"].split(dim), strict=True):
                put(f"{them}attention.{name}_proj.bias", value)
        put(f"{them}layer_scale1.lambda1", ours[f"{us}scale1.gamma"])
        put(f"{them}layer_scale2.lambda1", ours[f"{us}scale2.gamma"])
    assert not theirs
    return reference


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mlp": "swiglu", "mlp_hidden": 80},
        {"mlp": "swiglu", "mlp_hidden": 80, "qkv_bias": False, "untied_norms": "local_cls"},
        {"num_registers": 0, "key_bias": True, "norm_eps": 1e-6},
        {"patch_size": 16, "num_registers": 4},
    ],
    ids=["mlp", "swiglu", "7b", "key-bias", "patch16"],
)
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (48, 80)])
def test_features_equal_transformers(fields: dict[str, object], size: tuple[int, int]) -> None:
    model = make(**fields)
    config = ModelConfig.model_validate({**TINY, **fields})
    pixels = images(2, 3, *size)
    mask = images(2, size[0] * size[1] // config.patch_size**2, seed=5) > 0
    reference = published(model, config)
    with torch.no_grad():
        for masks in (None, mask):
            expected = reference(pixels, bool_masked_pos=masks).last_hidden_state
            got = model([pixels], [masks])[0]
            tokens = torch.cat([got.cls[:, None], got.registers, got.patches], dim=1)
            torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


def test_intermediate_layers_equal_transformers() -> None:
    model = make()
    pixels = images(2, 3, 32, 24)
    with torch.no_grad():
        states = published(model, ModelConfig.model_validate(TINY))(pixels, output_hidden_states=True).hidden_states
        for index, features in zip((0, 2), model.get_intermediate_layers(pixels, [2, 0], norm=False), strict=True):
            tokens = torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)
            torch.testing.assert_close(tokens, states[index + 1], atol=1e-5, rtol=1e-5)
        last = model.get_intermediate_layers(pixels)[-1]
        torch.testing.assert_close(last.patches, model.forward_features(pixels).patches)
    with pytest.raises(ValueError, match="3 blocks"):
        model.get_intermediate_layers(pixels, [3])


def test_packed_crops_equal_each_crop_alone() -> None:
    model = make()
    crops = [images(2, 3, 32, 32), images(3, 3, 16, 24, seed=1)]
    with torch.no_grad():
        for together, alone in zip(model(crops), crops, strict=True):
            for got, expected in zip(together, model.forward_features(alone), strict=True):
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunks_of_images_equal_the_whole(chunk: int) -> None:
    model = make(mlp="swiglu")
    crops = [images(4, 3, 32, 32), images(3, 3, 16, 16, seed=1)]
    with torch.no_grad():
        for got, expected in zip(model(crops, chunk=chunk), model(crops), strict=True):
            torch.testing.assert_close(got.patches, expected.patches, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(got.cls, expected.cls, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(("checkpointing", "groups"), [("selective", 1), ("block", 1), ("selective", 2), ("block", 7)])
def test_recomputed_gradients_equal_those_without_recomputation(checkpointing: str, groups: int, offload: bool) -> None:
    if offload and checkpointing != "block":
        pytest.skip("only the activations between blocks are offloaded")
    gradients = []
    for arguments in (("none",), (checkpointing, groups, offload)):
        model = make(*arguments, drop_path=0.4, rope_rescale=2.0, rope_shift=0.1, rope_jitter=1.5)
        crops = [images(5, 3, 32, 32), images(4, 3, 16, 16, seed=1)]
        features = model(crops, generator=torch.Generator().manual_seed(3))
        sum(piece.cls.square().sum() + piece.patches.sin().sum() for piece in features).backward()
        gradients.append([p.grad for n, p in model.named_parameters() if "mask_token" not in n])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None and recomputed is not None
        if groups == 1:
            assert torch.equal(plain, recomputed)
        else:
            # the order of sums over images differs
            torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


def saved_bytes(checkpointing: str) -> int:
    """Return the bytes that autograd saves for the backward."""
    model = make(checkpointing)
    sizes: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        sizes.append(0 if isinstance(tensor, torch.nn.Parameter) else tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model([images(4, 3, 32, 32)], generator=torch.Generator())
    return sum(sizes)


def test_more_recomputation_saves_fewer_bytes() -> None:
    plain, selective, block = (saved_bytes(mode) for mode in ("none", "selective", "block"))
    assert block < 0.3 * selective and selective < 0.8 * plain


def test_training_pass_is_a_function_of_its_generator() -> None:
    model = make(drop_path=0.4, rope_rescale=2.0)
    crops = [images(4, 3, 32, 32)]
    with torch.no_grad():
        first, again, other, evaluated = (
            model(crops, generator=generator)[0].cls
            for generator in (*(torch.Generator().manual_seed(seed) for seed in (1, 1, 2)), None)
        )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert not torch.allclose(first, evaluated)


def test_untied_norm_applies_to_the_local_prefix_in_training_only() -> None:
    model = make(untied_norms="cls_and_local_cls")
    assert model.local_norm is not None
    crops = [images(2, 3, 32, 32), images(2, 3, 16, 16)]
    with torch.no_grad():
        before, evaluated = model(crops, generator=torch.Generator()), model(crops)
        model.local_norm.bias += 1.0
        after, evaluated_after = model(crops, generator=torch.Generator()), model(crops)
    assert torch.equal(before[0].cls, after[0].cls) and torch.equal(before[1].patches, after[1].patches)
    torch.testing.assert_close(after[1].cls, before[1].cls + 1.0)
    torch.testing.assert_close(after[1].registers, before[1].registers + 1.0)
    assert torch.equal(evaluated[1].cls, evaluated_after[1].cls)


def test_cls_and_registers_can_have_a_separate_norm() -> None:
    tied, untied = make(), make(untied_norms="cls")
    common = {name: value for name, value in untied.state_dict().items() if not name.startswith("cls_norm")}
    tied.load_state_dict(common)
    assert untied.cls_norm is not None
    pixels = images(2, 3, 32, 32)
    with torch.no_grad():
        untied.cls_norm.load_state_dict(tied.norm.state_dict())
        for before, after in zip(tied.forward_features(pixels), untied.forward_features(pixels), strict=True):
            torch.testing.assert_close(before, after)
        untied.cls_norm.bias += 1.0
        (last,) = untied.get_intermediate_layers(pixels)
        for after in (untied.forward_features(pixels), last):
            torch.testing.assert_close(after.cls, tied.forward_features(pixels).cls + 1.0)
            assert torch.equal(after.patches, tied.forward_features(pixels).patches)


def output_rows(model: VisionTransformer, crops: list[Tensor], seed: int = 3) -> Tensor:
    """Return the rows of all CLS tokens and of some patches, two of them twice."""
    layout = model.layout(crops)
    patches = torch.randperm(layout.sizes()[0], generator=torch.Generator().manual_seed(seed))[:9]
    return torch.cat([layout.cls_rows(0, CPU), patches, patches[:2], layout.cls_rows(1, CPU)])


@pytest.mark.parametrize("drop_rate", [0.0, 0.4])
@pytest.mark.parametrize(
    ("checkpointing", "groups", "fields"),
    [
        ("none", 1, {}),
        ("selective", 1, {}),
        ("selective", 2, {}),
        ("block", 1, {"mlp": "swiglu", "mlp_hidden": 80}),
        ("block", 3, {}),
        # widths that the CPU kernels support
        ("block", 1, {"dim": 64, "num_heads": 2}),
        ("block", 1, {"dim": 64, "num_heads": 2, "mlp": "swiglu", "mlp_hidden": 96}),
    ],
)
def test_output_rows_and_their_gradients_equal_those_of_the_whole(
    checkpointing: str, groups: int, fields: dict[str, object], drop_rate: float
) -> None:
    model = make(checkpointing, groups, drop_path=drop_rate, rope_rescale=2.0, **fields)
    crops = [images(6, 3, 32, 32), images(5, 3, 16, 16, seed=1)]
    rows = output_rows(model, crops)
    by = images(len(rows), model.norm.normalized_shape[0], seed=4)
    found = []
    for only in (False, True):
        model.zero_grad()
        draw = torch.Generator().manual_seed(0)
        if only:
            tokens, _ = model.encode(crops, [None, None], draw, rows=rows)
        else:
            tokens = model.encode(crops, [None, None], draw)[0].index_select(0, rows)
        tokens.backward(by)
        found.append([tokens.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5 * float(want.abs().max()))


@pytest.mark.parametrize("fields", [{}, {"dim": 64, "num_heads": 2}])
@pytest.mark.parametrize("chunk", [0, 1, 4])
def test_a_teachers_rows_do_not_depend_on_its_chunk(chunk: int, fields: dict[str, object]) -> None:
    model = make(**fields)
    crops = [images(6, 3, 32, 32), images(5, 3, 16, 16, seed=1)]
    rows = output_rows(model, crops)
    with torch.no_grad():
        whole, _ = model.encode(crops, [None, None])
        tokens, _ = model.encode(crops, [None, None], chunk=chunk, rows=rows)
    torch.testing.assert_close(tokens, whole[rows])


@pytest.mark.parametrize("chunk", [0, 2])
def test_the_last_mlp_computes_no_other_rows(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    computed: list[int] = []
    original = layers.mlp_branch

    def mlp_branch(tokens: Tensor, rows: BranchRows, *arguments: Any) -> Tensor:
        computed.append(sum(rows.sizes))
        return original(tokens, rows, *arguments)

    monkeypatch.setattr(layers, "mlp_branch", mlp_branch)
    crops = [images(6, 3, 32, 32), images(5, 3, 16, 16, seed=1)]
    rows = output_rows(model, crops)
    with torch.no_grad():
        model.encode(crops, [None, None], chunk=chunk, rows=rows)
    assert sum(computed) == 2 * sum(model.layout(crops).sizes()) + len(rows)


def test_a_bf16_pass_is_close_to_fp32() -> None:
    model = make()
    pixels = images(2, 3, 32, 32)
    with torch.no_grad():
        exact = model.forward_features(pixels).cls
        rough = model.bfloat16().forward_features(pixels).cls
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() / exact.norm() < 0.03


def test_sizes_that_are_not_whole_patches_raise() -> None:
    with pytest.raises(ValueError, match="30 x 32 pixels"):
        make().forward_features(images(1, 3, 30, 32))


def test_all_blocks_share_one_compiled_graph() -> None:
    crops = [images(5, 3, 32, 32), images(4, 3, 16, 16, seed=1)]
    losses = []
    graphs = CompileCounterWithBackend("eager")
    for compiled in (False, True):
        model = make("block", drop_path=0.4, rope_rescale=2.0)
        if compiled:
            for block in model.blocks:
                block.transform = torch.compile(block.transform, backend=graphs, fullgraph=True, dynamic=False)
        for seed in (1, 2):
            features = model(crops, generator=torch.Generator().manual_seed(seed))
            loss = sum(piece.patches.sin().sum() for piece in features)
            loss.backward()
            losses.append(loss.detach())
    assert graphs.frame_count == 1
    # compiled attention is scaled_dot_product_attention, eager attention on a CPU is not
    torch.testing.assert_close(losses[2:], losses[:2], rtol=1e-5, atol=1e-5)
