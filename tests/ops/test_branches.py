"""The CPU kernels of a block's branches against PyTorch: accuracy, repeatability, non-finite inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from cpu_kernels import DTYPES, for_each_dtype, needs_kernels, record_kernel_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamtrain.config.model import ModelConfig
from streamtrain.model.initialise import initialise
from streamtrain.model.layout import DropPath, Group, Layout, draw_drop_path
from streamtrain.model.vit import VisionTransformer
from streamtrain.ops.attention import RopeTable
from streamtrain.ops.branches import BlockOptions, BranchWeights, attention_branch, mlp_branch
from streamtrain.ops.cpu.build import is_enabled

pytestmark = needs_kernels
CPU, EPS = torch.device("cpu"), 1e-5
BRANCHES = ("attention", "mlp")
# absolute tolerance of relative errors
SLACK = {torch.bfloat16: 1e-3, torch.float32: 1e-6}


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    assert all(is_enabled(dtype) for dtype in DTYPES)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclass
class Case:
    """One branch with random tokens and weights that all affect the result."""

    kind: str
    # (images, tokens per image) of each crop size
    groups: list[tuple[int, int]]
    num_heads: int = 2
    head_dim: int = 32
    hidden: int = 96
    gated: bool = False
    drop_rate: float = 0.0
    # of the first linear layer
    scale: float = 1.5
    seed: int = 0
    dtype: torch.dtype = DTYPES[0] if DTYPES else torch.float32
    layout: Layout = field(init=False)
    drop: DropPath | None = field(init=False)

    def __post_init__(self) -> None:
        self.draw = torch.Generator().manual_seed(self.seed)
        self.dim = self.num_heads * self.head_dim
        self.layout = Layout(tuple(Group(images, (1, length)) for images, length in self.groups), 0)
        self.drop = None
        if self.drop_rate:
            (self.drop,) = draw_drop_path(self.layout, 1, self.drop_rate, self.draw, CPU)
        width, within = (3 * self.dim, self.dim) if self.kind == "attention" else (self.hidden, self.hidden)
        width *= 2 if self.gated and self.kind == "mlp" else 1
        self.tokens = self.noise(self.layout.offset(len(self.groups)), self.dim, scale=2.0)
        self.gradient = self.noise(*self.tokens.shape)
        self.weights = [
            1.0 + self.noise(self.dim, scale=0.2), self.noise(self.dim, scale=0.1),
            self.noise(width, self.dim, scale=self.scale * self.dim**-0.5), self.noise(width, scale=0.2),
            self.noise(self.dim, within, scale=within**-0.5), self.noise(self.dim, scale=0.1),
            0.25 + self.noise(self.dim, scale=0.1),
        ]  # fmt: skip
        angles = [self.noise(length, 1, 1, self.head_dim // 2).float() for _, length in self.groups]
        self.tables = [
            RopeTable(*(torch.cat(both, -1).to(self.dtype) for both in ([a.cos()] * 2, [-a.sin(), a.sin()])))
            for a in angles
        ]

    def noise(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=self.draw)).to(self.dtype)

    def kernel(self, tokens: Tensor, weights: list[Tensor], in_place: bool = False) -> Tensor:
        options = BlockOptions(self.dim, self.hidden, self.num_heads, EPS, self.gated)
        rows = self.layout.branch_rows(self.drop, BRANCHES.index(self.kind))
        if self.kind == "mlp":
            return mlp_branch(tokens, rows, BranchWeights(*weights), options, in_place)
        return attention_branch(tokens, rows, self.tables, BranchWeights(*weights), options, in_place)

    def plain(self, tokens: Tensor, weights: list[Tensor]) -> Tensor:
        """Compute the branch from torch operations, in the tokens' dtype."""
        norm_weight, norm_bias, first, first_bias, last, last_bias, gamma = weights
        branch, layout = BRANCHES.index(self.kind), self.drop.layout if self.drop else self.layout
        inner = tokens.index_select(0, self.drop.rows[branch]) if self.drop else tokens
        inner = F.linear(F.layer_norm(inner, (self.dim,), norm_weight, norm_bias, EPS), first, first_bias)
        if self.kind == "attention":
            inner = torch.cat([self.attended(*each) for each in zip(layout.views(inner), self.tables, strict=True)])
        elif self.gated:
            gate, up = inner.chunk(2, -1)
            inner = F.silu(gate) * up
        else:
            inner = F.gelu(inner)
        inner = F.linear(inner, last, last_bias) * gamma
        if self.drop is None:
            return tokens + inner
        scales = torch.repeat_interleave(torch.tensor(self.drop.scales), torch.tensor(layout.sizes()))
        return tokens.index_add(0, self.drop.rows[branch], inner * scales[:, None].to(inner.dtype))

    def attended(self, packed: Tensor, table: RopeTable) -> Tensor:
        query, key, value = packed.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        cosine, sine = (factor[:, 0, 0].to(packed.dtype) for factor in (table.cosine, table.sine))
        query, key = (each * cosine + each.roll(self.head_dim // 2, -1) * sine for each in (query, key))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2).flatten(0, 1)

    def results(self, form: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Return the output, and the gradients of the tokens and of each weight."""
        dtype = dtype or self.dtype
        leaves = [value.to(dtype, copy=True).requires_grad_() for value in (self.tokens, *self.weights)]
        output = getattr(self, form)(leaves[0], leaves[1:])
        return [output.detach(), *torch.autograd.grad(output, leaves, self.gradient.to(dtype))]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def assert_accurate(case: Case) -> None:
    """Check that the kernel's error is at most about the error of the separate operations in the same dtype."""
    exact, plain, ours = case.results("plain", torch.float64), case.results("plain"), case.results("kernel")
    # with few tokens the two errors differ by chance
    factor = 1.2 if len(case.tokens) >= 32 else 2.0
    for name, want, rough, found in zip(
        ("output", "tokens", "norm", "norm bias", "first", "first bias", "last", "last bias", "gamma"),
        exact, plain, ours, strict=True,
    ):  # fmt: skip
        assert found.dtype == case.dtype and found.shape == want.shape
        assert error(found, want) <= factor * error(rough, want) + SLACK[case.dtype], name


@for_each_dtype
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    "case",
    [
        # crops of a real step
        Case("attention", [(4, 201), (20, 41)], num_heads=6, head_dim=64, drop_rate=0.3),
        Case("mlp", [(4, 201), (20, 41)], num_heads=6, head_dim=64, hidden=1536, drop_rate=0.3),
        Case("mlp", [(4, 201), (20, 41)], num_heads=6, head_dim=64, hidden=1024, gated=True, drop_rate=0.3),
        # more queries than a tile has
        Case("attention", [(1, 600)], head_dim=64),
        # scores with a standard deviation of 9
        Case("attention", [(3, 201)], num_heads=3, head_dim=64, scale=4.5),
        Case("mlp", [(1, 5)], num_heads=1),
    ],
    ids=["attention", "mlp", "swiglu", "long", "sharp", "few"],
)
def test_accuracy(case: Case, num_threads: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(num_threads)
    assert_accurate(replace(case, dtype=dtype))


@settings(max_examples=25)
@given(
    kind=st.sampled_from(BRANCHES),
    groups=st.lists(st.tuples(st.integers(1, 5), st.integers(2, 70)), min_size=1, max_size=3),
    num_heads=st.integers(1, 3),
    head_dim=st.sampled_from([32, 64, 96]),
    hidden=st.integers(1, 10).map(lambda parts: 32 * parts),
    gated=st.booleans(),
    drop_rate=st.sampled_from([0.0, 0.4]),
    num_threads=st.integers(1, 2),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES or [torch.float32]),
)
def test_accuracy_for_random_shapes(
    kind: str, groups: list[tuple[int, int]], num_heads: int, head_dim: int, hidden: int, gated: bool,
    drop_rate: float, num_threads: int, seed: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    torch.set_num_threads(num_threads)
    assert_accurate(Case(kind, groups, num_heads, head_dim, hidden, gated, drop_rate, seed=seed, dtype=dtype))


@for_each_dtype
@pytest.mark.parametrize("kind", BRANCHES)
def test_results_repeat_bit_for_bit_and_in_place(kind: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    case = Case(kind, [(7, 50), (9, 17)], drop_rate=0.3, dtype=dtype)
    first, *gradients = case.results("kernel")
    # another call in between, whose values stay in the kernels' scratch memory
    Case(kind, [(5, 90)], num_heads=3, dtype=dtype).results("kernel")
    for found, want in zip(case.results("kernel"), (first, *gradients), strict=True):
        assert torch.equal(found, want)
    with torch.no_grad():
        apart = case.kernel(case.tokens, case.weights)
        kept = case.tokens.clone()
        assert torch.equal(apart, first)
        within = case.kernel(kept, case.weights, in_place=True)
    assert torch.equal(within, first) and within.data_ptr() == kept.data_ptr()


@for_each_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "case",
    [Case("attention", [(3, 20)]), Case("mlp", [(3, 20)]), Case("mlp", [(3, 20)], gated=True)],
    ids=["attention", "mlp", "swiglu"],
)
def test_non_finite_inputs_propagate(case: Case, bad: float, dtype: torch.dtype) -> None:
    """A step is skipped because of its loss or its gradient norm, so these must become non-finite."""
    case = replace(case, dtype=dtype)
    for place, value in enumerate((case.tokens, *case.weights, case.gradient)):
        kept = value.clone()
        value.flatten()[7] = bad
        output, *gradients = case.results("kernel")
        value.copy_(kept)
        assert place == 8 or not output.isfinite().all(), place
        assert not all(gradient.isfinite().all() for gradient in gradients), place
    # a non-finite value affects only its image
    case.tokens[25] = bad
    assert case.results("kernel")[0].isfinite().all(1).sum() >= 40


@for_each_dtype
@pytest.mark.parametrize("size", [1e2, 1e6, 1e10, 1e16])
@pytest.mark.parametrize("gated", [False, True])
def test_activations_of_any_magnitude_are_accurate(size: float, gated: bool, dtype: torch.dtype) -> None:
    case = Case("mlp", [(4, 20)], scale=size, gated=gated, dtype=dtype)
    case.weights[4] /= size**2 if gated else size
    output, gradient, *_ = case.results("kernel")
    exact, exact_gradient, *_ = case.results("plain", torch.float64)
    assert error(output, exact) < 0.01
    assert error(gradient, exact_gradient) < 0.05


MODEL = ModelConfig.model_validate(
    {"dim": 64, "depth": 3, "num_heads": 2, "patch_size": 4, "num_registers": 2, "drop_path": 0.3, "rope_rescale": 2.0}
)


def backbone(
    dtype: torch.dtype, kernels: bool, checkpointing: str = "none", config: ModelConfig = MODEL
) -> VisionTransformer:
    """Return a backbone with the same weights in every dtype; each affects the result."""
    model = VisionTransformer(config, checkpointing)
    for block in model.blocks:
        if not kernels:
            block.options = replace(block.options, implementation="reference")
    initialise(model, config, seed=0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model.bfloat16().to(dtype)


def step(model: VisionTransformer) -> list[Tensor]:
    """Run a teacher pass in chunks, then a student pass; return both features and the gradients of all weights."""
    draw, dtype = torch.Generator().manual_seed(2), model.norm.weight.dtype
    crops = [torch.randn(count, 3, size, size, generator=draw).to(dtype) for count, size in ((6, 32), (10, 16))]
    masks = [torch.rand(6, 64, generator=draw) < 0.4, None]
    with torch.no_grad():
        taught = model(crops[:1], chunk=4)[0]
    features = model(crops, masks, generator=torch.Generator().manual_seed(3))
    learnt = [piece for each in features for piece in (each.cls, each.patches)]
    signs = [torch.randn(piece.shape, generator=draw).to(dtype) for piece in learnt]
    loss = sum((piece * sign).sum() for piece, sign in zip(learnt, signs, strict=True))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [taught.cls, taught.patches, *(piece.detach() for piece in learnt), *gradients]


@for_each_dtype
@pytest.mark.parametrize("mlp", ["mlp", "swiglu"])
def test_a_step_of_the_backbone_is_as_accurate_as_without_kernels(
    mlp: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MODEL.model_copy(update={"mlp": mlp, "mlp_hidden": 96})
    called = record_kernel_calls(monkeypatch.setattr)
    exact = step(backbone(torch.float64, True, config=config))
    rough = step(backbone(dtype, False, config=config))
    # float64 and the reference use no kernels
    assert not called
    ours = step(backbone(dtype, True, config=config))
    assert sorted(called) == sorted(
        f"{kind}_{direction}" for kind in BRANCHES for direction in ("forward", "forward", "backward") * config.depth
    )
    for want, plain, found in zip(exact, rough, ours, strict=True):
        assert error(found, want) <= 1.5 * error(plain, want) + 2 * SLACK[dtype]
    total = [torch.cat([value.double().flatten() for value in values]) for values in (exact, rough, ours)]
    assert error(total[2], total[0]) <= 1.1 * error(total[1], total[0]) + SLACK[dtype] / 10


def test_a_block_saves_only_the_inputs_of_its_branches() -> None:
    kept: dict[int, torch.Size] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.shape
        return tensor

    dtype = DTYPES[0]
    model = backbone(dtype, True, "block")
    tokens = torch.randn(500, MODEL.dim, dtype=dtype).requires_grad_()
    layout = Layout((Group(5, (7, 14)),), 2)
    tables = [RopeTable(*(torch.ones(100, 1, 1, 32, dtype=dtype) for _ in range(2)))]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        for block in model.blocks:
            tokens = block(tokens, layout, tables)
    # and the weights, with zeros for the keys' bias
    weights = sum(parameter.numel() for parameter in model.blocks.parameters()) + MODEL.depth * MODEL.dim
    assert sum(shape.numel() for shape in kept.values()) == 2 * MODEL.depth * tokens.numel() + weights


def test_the_caller_recomputes_nothing_around_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    called = record_kernel_calls(monkeypatch.setattr)
    plain = step(backbone(DTYPES[0], True))
    count = len(called)
    for found, want in zip(step(backbone(DTYPES[0], True, "block")), plain, strict=True):
        assert torch.equal(found, want)
    assert len(called) == 2 * count
