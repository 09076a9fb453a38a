"""Student and teacher as a run needs them: built in shards, filled from a checkpoint or from the seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from streamtrain.checkpoint import reader as checkpoint
from streamtrain.config.engine import EngineConfig
from streamtrain.config.tree import Config
from streamtrain.engine.fragments import Fragment
from streamtrain.engine.runtime import Runtime
from streamtrain.engine.teacher import FrozenNetwork, ShardedNetwork, Teacher
from streamtrain.engine.zero import Student, build_sharded, engine_config
from streamtrain.errors import CheckpointError, ConfigError
from streamtrain.interop.load_pretrained import load_pretrained_backbone
from streamtrain.model.compiled import compile_blocks
from streamtrain.model.fp8 import compute_in_fp8
from streamtrain.model.initialise import initial_value
from streamtrain.model.layers import Block
from streamtrain.objective.targets import TargetMaker
from streamtrain.training.distill import fill_frozen_teacher, frozen_teacher_config
from streamtrain.training.gram import GramAnchor
from streamtrain.training.ssl_model import GramTeacher, Learner

BACKBONE = "backbone."
# of the first GPUs that multiply 8-bit floating-point numbers
FP8_CAPABILITY = (8, 9)


def build_networks(config: Config, runtime: Runtime, accumulation: int) -> tuple[Student, Teacher]:
    """Student and teacher, sharded over all ranks; their values are undefined until written."""
    settings = _settings(config, runtime, accumulation)
    student = Student(_built(Learner, config, runtime, settings), Block, config, runtime, settings)
    on_host = config.teacher.average == "host"
    teacher = Teacher(_built(Learner, config, runtime, settings), Block, student, settings, on_host)
    return student, teacher


def build_gram_anchor(config: Config, runtime: Runtime, accumulation: int) -> GramAnchor:
    """The Gram teacher, sharded like the student, where the objective has a Gram term; to be filled by ``restore``."""
    if not config.objective.gram.is_active:
        return GramAnchor(config, None)
    settings = _settings(config, runtime, accumulation)
    module = _built(GramTeacher, config, runtime, settings)
    return GramAnchor(config, FrozenNetwork(module, Block, runtime.rank, settings))


def build_guide(config: Config, runtime: Runtime, accumulation: int, average: Teacher) -> ShardedNetwork:
    """Who teaches: the student's average, or a frozen network, filled.

    Raises:
        StreamtrainError: if ``teacher.weights`` cannot teach this student.
    """
    if config.teacher.kind == "ema":
        return average
    theirs = frozen_teacher_config(config)
    settings = _settings(theirs, runtime, accumulation)
    guide = FrozenNetwork(_built(Learner, theirs, runtime, settings), Block, runtime.rank, settings)
    fill_frozen_teacher(config, guide)
    return guide


def _built(
    network: Callable[[Config], torch.nn.Module], config: Config, runtime: Runtime, settings: dict[str, Any]
) -> torch.nn.Module:
    module = build_sharded(lambda: network(config), settings)
    prepare_blocks(module, config.engine, runtime)
    return module


def prepare_blocks(network: torch.nn.Module, engine: EngineConfig, runtime: Runtime) -> None:
    """Let the blocks compute as ``engine`` wishes.

    Raises:
        ConfigError: if this device cannot.
    """
    if engine.fp8:
        if runtime.dtype != torch.bfloat16:
            raise ConfigError("engine.fp8 needs bf16, and this device computes in fp32; set engine.dtype=bf16")
        if runtime.on_gpu and torch.cuda.get_device_capability(runtime.device) < FP8_CAPABILITY:
            name = runtime.description["device"]
            raise ConfigError(f"engine.fp8: this GPU ({name}) has no products in 8-bit floating point; set it to false")
        compute_in_fp8(network)
    if engine.compiles(on_gpu=runtime.on_gpu):
        compile_blocks(network)


def _settings(config: Config, runtime: Runtime, accumulation: int) -> dict[str, Any]:
    with torch.device("meta"):
        block_numel = sum(parameter.numel() for parameter in Block(config.model).parameters())
    return engine_config(config, runtime, accumulation, block_numel)


@dataclass(frozen=True)
class Position:
    """Where a run goes on: completed steps, and the saved state of the stream (None at a fresh start)."""

    step: int
    # of those, the ones that changed nothing since their numbers were not finite
    skipped_steps: int
    data: dict[str, Any] | None
    # the checkpoint that says so
    source: Path | None

    @property
    def slot(self) -> int:
        """The next slot of the stream."""
        return self.data["next_slot"] if self.data else 0

    @property
    def lane_block(self) -> int | None:
        """That of the saved order, which a change of the global batch must not change."""
        return self.data["lane_block"] if self.data else None


def restore(
    config: Config,
    resume_from: Path | None,
    student: Student,
    teacher: Teacher,
    target_maker: TargetMaker,
    gram: GramAnchor | None = None,
) -> Position:
    """Fill the networks from the newest whole checkpoint, from somebody's backbone, or from the seed.

    The run folder's own checkpoint comes before ``resume_from``, then ``init.weights``, then a fresh start.

    Raises:
        CheckpointError: if the checkpoint belongs to another model, or there are some and none is whole.
        StreamtrainError: if ``init.weights`` cannot be read, or is of another model.
    """
    source = checkpoint.find_newest_intact(Path(config.run.dir), resume_from)
    if source is None:
        with starting_values(config, student) as read:
            student.write(read, optimizer_steps=0)
        # which starts as a copy
        teacher.write(lambda key, _: student.master(key.partition("/")[2]))
        if gram is not None:
            gram.start(None)
        return Position(0, 0, None, None)
    with checkpoint.open_checkpoint(source) as reader:
        for name, fragment in student.fragments.items():
            if reader.state["shapes"].get(name) != list(fragment.shape):
                raise CheckpointError(
                    f"{reader.folder} holds {name} as {reader.state['shapes'].get(name)}, the configuration makes "
                    f"it {list(fragment.shape)}; use the model that the run was started with"
                )
        skipped = int(reader.state.get("skipped_steps", 0))
        student.write(reader.read, optimizer_steps=reader.step - skipped)
        teacher.write(reader.read)
        target_maker.load_state_dict(reader.read_shared())
        if gram is not None:
            gram.start(reader)
        return Position(reader.step, skipped, reader.state["data"], source)


@contextmanager
def starting_values(config: Config, student: Student) -> Iterator[Callable[[str, Fragment], torch.Tensor]]:
    """Yield what a new run reads its fragments from: ``init.weights`` for the backbone, the seed for the rest."""
    with ExitStack() as stack:
        adopted: Callable[[str], torch.Tensor | None] = lambda name: None  # noqa: E731
        if config.init.weights is not None:
            shapes = {
                name.removeprefix(BACKBONE): torch.Size(fragment.shape)
                for name, fragment in student.fragments.items()
                if name.startswith(BACKBONE)
            }
            path = Path(config.init.weights).expanduser()
            adopted, report = stack.enter_context(load_pretrained_backbone(path, shapes, config.init.minimum_matched))
            if dist.get_rank() == 0:
                print(f"backbone from {path}: {report.text()}", flush=True)

        def read(key: str, fragment: Fragment) -> torch.Tensor:
            name = key.partition("/")[2]
            value = adopted(name.removeprefix(BACKBONE)) if name.startswith(BACKBONE) else None
            if value is None:
                value = initial_value(name, fragment.shape, config.model, config.run.seed)
            return fragment.cut(value)

        yield read
