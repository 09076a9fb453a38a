"""Build the sharded networks of a run and its loader; fill them from a checkpoint, weights or the seed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shards.reading.mixture import AnySet
from shards.reading.quarantine import Quarantine
from streamtrain.checkpoint import reader as checkpoint
from streamtrain.config.engine import EngineConfig
from streamtrain.config.model import is_adapter
from streamtrain.config.tree import Config
from streamtrain.data.loader import Loader
from streamtrain.engine.fragments import Fragment
from streamtrain.engine.runtime import Runtime
from streamtrain.engine.teacher import FrozenNetwork, ShardedNetwork, Teacher
from streamtrain.engine.zero import Student, build_sharded, engine_config
from streamtrain.errors import CheckpointError, ConfigError
from streamtrain.interop.feature_teacher import check_stated_model
from streamtrain.interop.load_pretrained import load_pretrained_backbone
from streamtrain.interop.patch_embedding import RgbAdaptation
from streamtrain.interop.state_file import describe_names
from streamtrain.model.compiled import compile_blocks
from streamtrain.model.fp8 import compute_in_fp8
from streamtrain.model.initialise import initial_value
from streamtrain.model.layers import Block
from streamtrain.model.vit import VisionTransformer
from streamtrain.objective.targets import TargetMaker, TeacherPrototypes
from streamtrain.planning.shapes import block_shapes
from streamtrain.run.directory import QUARANTINE_NAME
from streamtrain.training.anchor import StartAnchor
from streamtrain.training.distill import fill_frozen_teacher, frozen_teacher_config
from streamtrain.training.feature_teacher import FeatureTeacher, describe_teacher, fill_feature_teacher
from streamtrain.training.gram import BACKBONE, GramAnchor
from streamtrain.training.ssl_model import FrozenBackbone, SSLModel

# compute capability of the first GPUs with FP8 matmuls
FP8_CAPABILITY = (8, 9)
HEADS = ("global_head", "patch_head")
ModuleClass = Callable[[Config], torch.nn.Module]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Networks:
    """The networks of a run and the objective's state."""

    student: Student
    teacher: Teacher
    # its outputs are the targets: the teacher, or a frozen network
    target_teacher: ShardedNetwork
    teacher_prototypes: TeacherPrototypes
    gram: GramAnchor
    anchor: StartAnchor
    target_maker: TargetMaker

    @classmethod
    def build(cls, config: Config, runtime: Runtime) -> Networks:
        """Build all networks in shards; all but a frozen teacher have undefined values until ``restore``.

        Raises:
            StreamtrainError: if ``teacher.weights`` does not fit this student.
        """
        _, accumulation = config.batch_split(runtime.world_size)
        student, teacher = build_networks(config, runtime, accumulation)
        target_teacher: ShardedNetwork = teacher
        if config.teacher.kind == "frozen":
            target_teacher = _build_target_teacher(config, runtime, accumulation)
        objective = config.objective
        gram_network = anchor_network = None
        if objective.gram.is_active:
            gram_network = _build_frozen(FrozenBackbone, config, runtime, accumulation)
        if objective.anchor.is_active:
            # what LoRA freezes keeps the values of the start
            anchor_network = _build_frozen(FrozenBackbone, config, runtime, accumulation, student.frozen)
        gram, anchor = GramAnchor(config, gram_network), StartAnchor(config, anchor_network)
        prototypes = TeacherPrototypes(*(target_teacher.weight(f"{head}.prototypes.weight") for head in HEADS))
        return cls(student, teacher, target_teacher, prototypes, gram, anchor, TargetMaker(config.objective))


def build_networks(config: Config, runtime: Runtime, accumulation: int) -> tuple[Student, Teacher]:
    """Build student and teacher, sharded over all ranks; their values are undefined until written."""
    module, settings = _build_module(SSLModel, config, runtime, accumulation)
    student = Student(module, Block, config, runtime, settings)
    module, settings = _build_module(SSLModel, config, runtime, accumulation)
    return student, Teacher(module, Block, student, settings, config.teacher.average == "host")


def _build_target_teacher(config: Config, runtime: Runtime, accumulation: int) -> FrozenNetwork:
    """Build and fill the frozen teacher: the network of another run, or a backbone without heads."""
    if (backbone := config.teacher.backbone) is None:
        frozen = _build_frozen(SSLModel, frozen_teacher_config(config), runtime, accumulation)
        fill_frozen_teacher(config, frozen)
        return frozen
    # DeepSpeed's limits follow the blocks of the network that is built
    sized = config.model_copy(update={"model": backbone})
    description = describe_teacher(config)
    frozen = _build_frozen(lambda _: FeatureTeacher(config, description), sized, runtime, accumulation)
    fill_feature_teacher(config, frozen)
    return frozen


def _build_frozen(
    network: ModuleClass, config: Config, runtime: Runtime, accumulation: int,
    shared: Mapping[str, torch.nn.Parameter] | None = None,
) -> FrozenNetwork:  # fmt: skip
    module, settings = _build_module(network, config, runtime, accumulation)
    return FrozenNetwork(module, Block, runtime.rank, settings, shared)


def _build_module(
    network: ModuleClass, config: Config, runtime: Runtime, accumulation: int
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Build a sharded module; return it with DeepSpeed's settings."""
    block_numel = sum(map(math.prod, block_shapes(config.model).values()))
    settings = engine_config(config, runtime, accumulation, block_numel)
    module = build_sharded(lambda: network(config), settings)
    prepare_blocks(module, config.engine, runtime)
    return module, settings


def prepare_blocks(network: torch.nn.Module, engine: EngineConfig, runtime: Runtime) -> None:
    """Set up FP8 and compilation of the blocks as ``engine`` configures them.

    Raises:
        ConfigError: if this device does not support it.
    """
    if engine.fp8:
        if runtime.dtype != torch.bfloat16:
            raise ConfigError("engine.fp8 needs bf16, but this device computes in fp32; set engine.dtype=bf16")
        if runtime.on_gpu and torch.cuda.get_device_capability(runtime.device) < FP8_CAPABILITY:
            name = runtime.description["device"]
            raise ConfigError(f"engine.fp8: this GPU ({name}) has no FP8 matmuls; set engine.fp8=false")
        compute_in_fp8(network)
    if engine.compiles(on_gpu=runtime.on_gpu):
        compile_blocks(network)


@dataclass(frozen=True)
class StartState:
    """Where a run starts: completed steps and the saved state of the stream (None for a new run)."""

    step: int
    # completed steps whose non-finite update was skipped
    skipped_steps: int
    data: dict[str, Any] | None
    # the checkpoint that was restored
    source: Path | None
    # whether it is the run's own, not another run's
    is_resumed: bool = False

    @property
    def slot(self) -> int:
        """The next slot of the stream."""
        return self.data["next_slot"] if self.data else 0

    @property
    def lane_block(self) -> int | None:
        """The lane block of the saved order, which must not change with the global batch."""
        return self.data["lane_block"] if self.data else None


def restore(
    config: Config,
    resume_from: Path | None,
    student: Student,
    teacher: Teacher,
    target_maker: TargetMaker,
    gram: GramAnchor | None = None,
    anchor: StartAnchor | None = None,
) -> StartState:
    """Fill the networks from the newest intact checkpoint, from pretrained weights, or from the seed.

    The run's own checkpoints take precedence over those of ``resume_from``, and these over ``init.weights``.

    Raises:
        CheckpointError: if the checkpoint has a different model, or all checkpoints are damaged.
        StreamtrainError: if ``init.weights`` cannot be read or has a different model.
    """
    source = checkpoint.find_newest_intact(Path(config.run.dir), resume_from)
    if source is None:
        with starting_values(config, student) as read:
            student.write(read, optimizer_steps=0)
        # the teacher starts as a copy of the student
        teacher.write(lambda key, _: student.master(key.partition("/")[2]))
        if gram is not None:
            gram.start(None)
        if anchor is not None:
            anchor.start(teacher, None)
        return StartState(0, 0, None, None)
    with checkpoint.open_checkpoint(source, is_verified=True) as reader:
        for name, fragment in student.fragments.items():
            saved_shape = reader.state["shapes"].get(name)
            if saved_shape != list(fragment.shape):
                raise CheckpointError(
                    f"checkpoint {reader.folder} has a different model: {name} is {list(fragment.shape)}, the "
                    f"checkpoint has {saved_shape}; use the model section of the run"
                )
        skipped = int(reader.state.get("skipped_steps", 0))
        student.write(reader.read, optimizer_steps=reader.step - skipped)
        teacher.write(reader.read)
        target_maker.load_state_dict(reader.read_shared())
        if gram is not None:
            gram.start(reader)
        is_own = source.parent.parent.resolve() == Path(config.run.dir).resolve()
        if anchor is not None:
            anchor.start(teacher, reader if is_own else None)
        return StartState(reader.step, skipped, reader.state["data"], source, is_own)


@contextmanager
def starting_values(config: Config, student: Student) -> Iterator[Callable[[str, Fragment], torch.Tensor]]:
    """Yield a function that reads the fragments of a new run: ``init.weights`` for the backbone, else the seed."""
    with ExitStack() as stack:
        pretrained: Callable[[str], torch.Tensor | None] = lambda name: None  # noqa: E731
        backbone = student.module.backbone
        assert isinstance(backbone, VisionTransformer)
        if config.init.weights is not None:
            shapes = {
                name.removeprefix(BACKBONE): torch.Size(fragment.shape)
                for name, fragment in student.fragments.items()
                if name.startswith(BACKBONE) and not is_adapter(name)
            }
            path = Path(config.init.weights)
            adaptation = RgbAdaptation(
                config.init.channels, config.model.channels, is_needed=not config.objective.gram.has_weights
            )
            loaded = load_pretrained_backbone(path, shapes, config.init.minimum_matched, "init.weights", adaptation)
            pretrained, report = stack.enter_context(loaded)
            logger.info("backbone from %s: %s", path, report.text())
            if config.init.minimum_matched > 0:
                check_stated_model(path, config.model, "init.weights")
            frozen = [name for name in (*report.missing, *report.reshaped) if BACKBONE + name in student.frozen]
            # timm's weights have no mask token; it starts as zeros
            if made_up := [name for name in frozen if name != "embedding.mask_token"]:
                raise ConfigError(
                    f"model.lora freezes {describe_names(made_up)}, which {path} does not have: choose other weights, "
                    "or a model section without it"
                )

        def read(key: str, fragment: Fragment) -> torch.Tensor:
            name = key.partition("/")[2]
            value = pretrained(name.removeprefix(BACKBONE)) if name.startswith(BACKBONE) else None
            if value is None:
                value = initial_value(name, fragment.shape, config.model, config.run.seed, backbone)
            return fragment.cut(value)

        yield read


def build_loader(config: Config, runtime: Runtime, shard_set: AnySet, start: StartState) -> Loader:
    """Build this rank's stream of micro-batches, from the next slot to the end of the run."""
    global_batch, _ = config.batch_split(runtime.world_size)
    return Loader(
        shard_set, config, rank=runtime.rank, world_size=runtime.world_size, device=runtime.device,
        start_slot=start.slot, end_slot=start.slot + (config.run.steps - start.step) * global_batch,
        lane_block=start.lane_block, cores=runtime.launch.cores,
        quarantine=Quarantine(Path(config.run.dir) / QUARANTINE_NAME, config.data.max_unusable_share),
    )  # fmt: skip
