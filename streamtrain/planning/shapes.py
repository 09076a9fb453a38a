"""Names and shapes of a ``SSLModel``'s parameters, and ZeRO-3's partitioning of them, without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from streamtrain.config.model import HeadConfig, ModelConfig
from streamtrain.config.tree import Config
from streamtrain.planning.parameter_groups import GroupRule, rule_of

# DeepSpeed's sub_group_size: it splits a parameter group into flat tensors of about this many values
SUB_GROUP_NUMEL = 100_000_000

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(config: Config) -> Shapes:
    """Return every parameter's shape, in the order of ``SSLModel.named_parameters()``."""
    objective = config.objective
    shapes = {f"backbone.{name}": shape for name, shape in backbone_shapes(config.model).items()}
    if (teacher := config.teacher.backbone) is not None:
        return shapes | projector_shapes(config, teacher)
    shapes |= dict(_head("global_head", config.model.dim, objective.global_loss.head))
    if objective.patch_loss.kind == "ibot":
        shapes |= dict(_head("patch_head", config.model.dim, objective.patch_loss.head))
    return shapes


def trained_shapes(config: Config) -> Shapes:
    """Return the shapes of the parameters that train; LoRA freezes most of the backbone."""
    return {name: shape for name, shape in parameter_shapes(config).items() if is_trained(name, config.model)}


def is_trained(name: str, model: ModelConfig) -> bool:
    """Return whether a parameter of a ``SSLModel`` trains."""
    return not name.startswith("backbone.") or model.is_trained(name.removeprefix("backbone."))


def backbone_shapes(model: ModelConfig) -> Shapes:
    """Return every backbone parameter's shape, in the order of ``named_parameters()``.

    A network of ``model.factory`` is built without memory for its values, which loads torch.
    """
    if model.factory is not None:
        from streamtrain.model.factory import backbone_shapes as shapes_of_factory

        return shapes_of_factory(model)
    dim = model.dim
    shapes: Shapes = {
        "embedding.cls_token": (1, dim),
        **({"embedding.register_tokens": (model.num_registers, dim)} if model.num_registers else {}),
        "embedding.mask_token": (1, dim),
        "embedding.projection.weight": (dim, model.channels * model.patch_size**2),
        "embedding.projection.bias": (dim,),
    }
    for index in range(model.depth):
        block = block_shapes(model, index in model.adapted_blocks)
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in block.items()}
    shapes |= dict(_norm("norm", dim))
    if model.cls_norm:
        shapes |= dict(_norm("cls_norm", dim))
    if model.local_norm:
        shapes |= dict(_norm("local_norm", dim))
    return shapes


def block_shapes(model: ModelConfig, adapted: bool = True) -> Shapes:
    """Return the shapes of a block's parameters: the first block's if the network is of ``model.factory``.

    ``adapted``: with the adapters of ``model.lora``, if any.
    """
    if model.factory is not None:
        first = "blocks.0."
        return {
            name.removeprefix(first): shape for name, shape in backbone_shapes(model).items() if name.startswith(first)
        }
    dim, hidden = model.dim, model.hidden
    ranks = dict.fromkeys(model.lora.targets, model.lora.rank) if adapted else {}
    shapes: Shapes = dict(_norm("norm1", dim))
    shapes["attention.qkv.weight"] = (3 * dim, dim)
    if model.qkv_bias:
        shapes["attention.qkv.bias"] = (3 * dim if model.key_bias else 2 * dim,)
    shapes |= dict(_adapter("attention.qkv", dim, 3 * dim, ranks.get("qkv", 0)))
    shapes |= dict(_linear("attention.proj", dim, dim))
    shapes |= dict(_adapter("attention.proj", dim, dim, ranks.get("proj", 0)))
    shapes["scale1.gamma"] = (dim,)
    shapes |= dict(_norm("norm2", dim))
    first, outputs = ("mlp.gate_up", 2 * hidden) if model.mlp == "swiglu" else ("mlp.up", hidden)
    shapes |= dict(_linear(first, dim, outputs))
    shapes |= dict(_adapter(first, dim, outputs, ranks.get("mlp", 0)))
    shapes |= dict(_linear("mlp.down", hidden, dim))
    shapes |= dict(_adapter("mlp.down", hidden, dim, ranks.get("mlp", 0)))
    shapes["scale2.gamma"] = (dim,)
    return shapes


def _norm(name: str, dim: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (dim,)
    yield f"{name}.bias", (dim,)


def _linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _adapter(name: str, inputs: int, outputs: int, rank: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    if rank:
        yield f"{name}.lora_a", (rank, inputs)
        yield f"{name}.lora_b", (outputs, rank)


def _head(name: str, dim: int, head: HeadConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    sizes = [dim, *[head.hidden] * (head.layers - 1), head.bottleneck]
    for index, (inputs, outputs) in enumerate(pairwise(sizes)):
        yield from _linear(f"{name}.projection.layers.{index}", inputs, outputs)
    yield f"{name}.prototypes.weight", (head.prototypes, head.bottleneck)


def projector_shapes(config: Config, teacher: ModelConfig) -> Shapes:
    """Return the shapes of the projector from the student's width to that of ``teacher``."""
    layers, hidden = config.teacher.projector_layers, config.teacher.projector_hidden or teacher.dim
    sizes = [config.model.dim, *[hidden] * (layers - 1), teacher.dim]
    shapes: Shapes = {}
    for index, (inputs, outputs) in enumerate(pairwise(sizes)):
        shapes |= dict(_linear(f"projector.layers.{index}", inputs, outputs))
    return shapes


@dataclass(frozen=True)
class Partition:
    """Sizes, in values, of a set of parameters and of one rank's shards."""

    # all parameters
    numel: int
    # one rank's shards, with padding
    shard_numel: int
    # each flat tensor of one rank
    flat_numels: tuple[int, ...]
    # the largest parameter
    largest_numel: int


def partition(shapes: Shapes, config: Config, world_size: int) -> Partition:
    """Partition parameters over ``world_size`` ranks as ZeRO-3 does.

    Each parameter is split into equal shards, the last one padded. The shards of parameters with the same rule are
    concatenated, in order, into flat tensors that end once they reach ``SUB_GROUP_NUMEL``.
    """
    groups: dict[GroupRule, list[int]] = {}
    for name, shape in shapes.items():
        rule = rule_of(name, len(shape), config.model.depth, config.optim)
        groups.setdefault(rule, []).append(-(-math.prod(shape) // world_size))
    flats: list[int] = []
    for sizes in groups.values():
        filled = 0
        for size in sizes:
            filled += size
            if filled >= SUB_GROUP_NUMEL < sum(sizes):
                flats.append(filled)
                filled = 0
        if filled:
            flats.append(filled)
    numels = [math.prod(shape) for shape in shapes.values()]
    return Partition(sum(numels), sum(map(sum, groups.values())), tuple(flats), max(numels, default=0))
