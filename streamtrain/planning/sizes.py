"""Sizes of a rank's tensors that several of its buffers depend on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from streamtrain.config.masks import max_rows
from streamtrain.config.model import HeadConfig, ModelConfig
from streamtrain.config.tree import Config
from streamtrain.planning.shapes import block_shapes, is_trained, parameter_shapes, partition

# of a block's branches (``streamtrain/ops/branches.py``)
Implementation = Literal["cpu_kernels", "reference"]
CPU_KERNELS: Implementation = "cpu_kernels"


@dataclass(frozen=True)
class StoredImages:
    """Means over the images of a shard set."""

    pixels: int
    # encoded
    num_bytes: int


# assumed if the set is unknown
ASSUMED_IMAGES = StoredImages(500_000, 100_000)


@dataclass(frozen=True)
class Sizes:
    """Sizes used by several parts."""

    config: Config
    world_size: int
    on_gpu: bool
    implementation: Implementation
    # the CPU kernels are loaded, with their allocator, whether or not blocks can use them
    has_kernels: bool
    # bytes per value of the dtype that the networks compute in
    item: int
    accumulation: int
    # values of all parameters, and of this rank's shards of trained and of frozen ones
    numel: int
    shard: int
    frozen_shard: int
    # values of all trained parameters, and of each flat tensor of this rank, which has only these
    trained_numel: int
    flats: tuple[int, ...]
    # values of the largest parameter and of the largest trained one
    largest_whole: int
    largest_trained: int
    # values of a block, and at most how many of them train
    block: int
    trained_block: int
    # tokens of a global and of a local crop
    global_tokens: int
    local_tokens: int
    masked_rows: int
    stored: StoredImages
    # of one rank
    cores: int

    @classmethod
    def of(
        cls, config: Config, world_size: int, on_gpu: bool, bf16: bool, supported: Implementation,
        stored: StoredImages | None, cores: int,
    ) -> Sizes:  # fmt: skip
        _, accumulation = config.batch_split(world_size)
        shapes = parameter_shapes(config)
        trained = {name: shape for name, shape in shapes.items() if is_trained(name, config.model)}
        frozen = {name: shape for name, shape in shapes.items() if name not in trained}
        part, frozen_part = (partition(each, config, world_size) for each in (trained, frozen))
        prefix = 1 + config.model.num_registers
        crops, batch = config.crops, config.data.micro_batch
        patches, local_patches = (
            size.patches(config.model.patch_size) for size in (crops.global_size, crops.local_size)
        )
        block = sum(map(math.prod, block_shapes(config.model).values()))
        trained_block = max(
            sum(math.prod(shape) for name, shape in trained.items() if name.startswith(f"backbone.blocks.{index}."))
            for index in {config.model.trained_blocks[0], config.model.depth - 1}
        )
        rows = max_rows(config.masks, batch, crops.global_count, patches, math.gcd(batch, config.masks.group))
        if config.teacher.kind == "frozen":
            # its student learns from all patches
            rows = batch * crops.global_count * patches
        return cls(
            config, world_size, on_gpu, _implementation(config, on_gpu, supported),
            not on_gpu and config.engine.cpu_kernels and supported == CPU_KERNELS, 2 if bf16 else 4, accumulation,
            part.numel + frozen_part.numel, part.shard_numel, frozen_part.shard_numel, part.numel, part.flat_numels,
            max(part.largest_numel, frozen_part.largest_numel), part.largest_numel, block, trained_block,
            prefix + patches, prefix + local_patches, rows, stored or ASSUMED_IMAGES, cores,
        )  # fmt: skip

    @property
    def images(self) -> tuple[int, int]:
        """Number of global and of local crops of a micro-batch."""
        batch = self.config.data.micro_batch
        return self.config.crops.global_count * batch, self.config.crops.local_count * batch

    @property
    def feature_teacher(self) -> tuple[ModelConfig, int] | None:
        """The backbone of a feature teacher and its tokens in a micro-batch; None without one."""
        if (model := self.config.teacher.backbone) is None:
            return None
        patches = self.config.crops.global_size.patches(model.patch_size)
        return model, self.images[0] * (1 + model.num_registers + patches)

    @property
    def tokens(self) -> int:
        """Number of the student's tokens in a micro-batch."""
        return self.images[0] * self.global_tokens + self.images[1] * self.local_tokens

    @property
    def kept_tokens(self) -> int:
        """Number of these tokens that drop-path keeps in a branch."""
        kept = [max(1, round((1 - self.config.model.drop_path) * images)) if images else 0 for images in self.images]
        return kept[0] * self.global_tokens + kept[1] * self.local_tokens

    @property
    def heads(self) -> list[tuple[str, HeadConfig, int, int]]:
        """Name, configuration, student rows and teacher rows (of one micro-batch) of each head, if there are any."""
        objective = self.config.objective
        if self.config.teacher.model is not None:
            return []
        heads = [("global", objective.global_loss.head, sum(self.images), self.images[0])]
        if objective.patch_loss.kind == "ibot":
            heads.append(("patch", objective.patch_loss.head, self.masked_rows, self.masked_rows))
        return heads


def _implementation(config: Config, on_gpu: bool, supported: Implementation) -> Implementation:
    """Return the implementation of a block's branches that ``ops/branches.py`` will choose."""
    model, engine = config.model, config.engine
    if on_gpu or not engine.cpu_kernels or engine.fp8 or engine.compiles(on_gpu=False) or model.lora.rank:
        return "reference"
    is_tileable = all(width % 32 == 0 for width in (model.dim, model.hidden, model.dim // model.num_heads))
    return supported if is_tileable else "reference"
