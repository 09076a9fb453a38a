"""Every setting has an effect: it changes results, or a run reads it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_images import draw_folder
from faulty_server import faulty_server
from ranks import ROOT
from tiny_backbone import class_folder, tiny_weights
from tiny_run import command

from shards.packing.pack import PackOptions, pack
from streamtrain.config.load import build, merge, open_shard_set, parse_override
from streamtrain.config.tree import Config, walk_settings
from streamtrain.data.batch import Batch, Masks
from streamtrain.data.loader import Loader
from streamtrain.engine.moments import moments_maker
from streamtrain.engine.optim import AdamW, parameter_groups, set_rates
from streamtrain.engine.runtime import Launch, Runtime
from streamtrain.engine.zero import engine_config
from streamtrain.model.initialise import initialise
from streamtrain.model.vit import Features
from streamtrain.objective.prototypes import PlainWeight
from streamtrain.objective.targets import TargetMaker, TeacherFeatures, TeacherPrototypes
from streamtrain.training.anchor import StartAnchor
from streamtrain.training.build import prepare_blocks
from streamtrain.training.gram import GramAnchor
from streamtrain.training.ssl_model import LossWeights, SSLModel
from streamtrain.training.step import StepValues

HEAD = {"prototypes": 24, "hidden": 12, "bottleneck": 8}
BASE: dict[str, Any] = {
    "run": {"steps": 20},
    "data": {"micro_batch": 4, "global_batch": 8, "lanes": 4, "window": 2, "decode_threads": 1},
    "model": {"patch_size": 8, "dim": 16, "depth": 2, "num_heads": 2, "layerscale": 0.5, "drop_path": 0.25},
    "crops": {"global_size": 32, "local_size": 16, "local_count": 2},
    "objective": {"global_loss": {"head": HEAD}, "patch_loss": {"head": HEAD}, "gram": {"weight": 1.0}},
    "schedules": {"lr": 1e-3, "weight_decay": 0.1},
}


def batches(config: Config) -> object:
    """Return shapes and digests of the pixels and masks of the first micro-batches."""
    with Loader(open_shard_set(config), config, rank=0, world_size=1, device="cpu") as loader:
        return [
            [(tuple(t.shape), hashlib.sha256(t.numpy().tobytes()).hexdigest()) for t in batch.tensors()]
            for batch in islice(loader, 4)
        ]


def fixed_batch(config: Config) -> Batch:
    draw, crops = torch.Generator().manual_seed(0), config.crops
    images = [
        torch.randint(0, 256, (count * 4, *size, config.model.channels), dtype=torch.uint8, generator=draw)
        for count, size in ((crops.global_count, crops.global_size), (crops.local_count, crops.local_size))
    ]
    patches = crops.global_size.patches(config.model.patch_size)
    mask = torch.rand(len(images[0]), patches, generator=draw) < 0.5
    mask[:, 0] = True
    index = mask.flatten().nonzero()[:, 0]
    weight = (1 / mask.sum(1).float())[:, None].expand_as(mask)[mask]
    return Batch(torch.arange(4).numpy(), images[0], images[1], Masks(mask, index, weight))


def losses(config: Config) -> object:
    """Return the losses of a batch, names and shapes of the parameters, and the softmax centres."""
    student, teacher = SSLModel(config), SSLModel(config)
    for seed, network in enumerate((student, teacher)):
        initialise(network, config.model, seed)
        # with initial weights attention is nearly uniform, so that RoPE has hardly any effect
        network.requires_grad_(False)
        for value in network.backbone.blocks.parameters():
            value.mul_(4.0).add_(0.05)
    batch, maker = fixed_batch(config), TargetMaker(config.objective)
    heads = [head and PlainWeight(head.prototypes.weight) for head in (teacher.global_head, teacher.patch_head)]
    weights = LossWeights(koleo=1.0)
    # two steps, so that the momentum of the centre has an effect
    for each in (replace(batch, global_crops=255 - batch.global_crops), batch):
        (targets,) = maker.make([teacher.teacher_features(each, weights)], TeacherPrototypes(*heads), 0.05)
    terms = {name: float(value) for name, value in student.student_losses(batch, targets, weights).items()}
    shapes = {name: tuple(value.shape) for name, value in student.named_parameters()}
    return terms, shapes, {name: float(center.norm()) for name, center in maker.centers.items()}


def distilled(config: Config) -> object:
    """Return the losses against random features of a teacher, and the shapes of the parameters."""
    student, backbone, batch = SSLModel(config), config.teacher.backbone, fixed_batch(config)
    assert backbone is not None
    initialise(student, config.model, 0)
    cls, patches = (torch.randn(rows, backbone.dim, generator=draw()) for rows in (8, len(batch.masks.index)))
    features = TeacherFeatures(cls, patches, batch.masks.weight)
    (targets,) = TargetMaker(config.objective).make([features], TeacherPrototypes(None, None), 0.05)
    terms = student.student_losses(batch, targets, LossWeights())
    shapes = {name: tuple(value.shape) for name, value in student.named_parameters()}
    return {name: float(value.detach()) for name, value in terms.items()}, shapes


def local_norm(config: Config) -> object:
    return [name for name, _ in SSLModel(config).named_parameters()]


def steps(config: Config) -> object:
    """Return the scheduled values of some steps."""
    return [StepValues.at(step, config, config.batch_split(1)[0]) for step in (0, 1, 5, 19)]


def optimiser(config: Config) -> object:
    """Return parameters after some optimizer steps, the types of the moments, and the files of moments on disk."""
    names = ("backbone.embedding.projection.weight", "backbone.blocks.0.mlp.up.weight", "backbone.norm.weight")
    named = [(name, torch.nn.Parameter(torch.ones(600 if "up" in name else 3))) for name in names]
    folder = Path(config.engine.moments_dir or f"{config.run.dir}/moments")
    make_moments = moments_maker(config.engine, folder, torch.device("cpu"))
    adamw = AdamW(parameter_groups(named, 2, config.optim), config.optim, make_moments)
    for step in range(3):
        set_rates(adamw.param_groups, 1e-2, 0.1, last_layer_frozen=False)
        for _, parameter in named:
            parameter.grad = 1e-5 * torch.ones_like(parameter) * (1.0 + step)
        adamw.step()
    files = sorted(str(path) for path in Path(str(config.engine.moments_dir)).rglob("*"))
    return [p.detach().sum().item() for _, p in named], [type(adamw.moments(p)).__name__ for _, p in named], files


def engine(config: Config) -> object:
    """Return the DeepSpeed configuration and the attributes of backbone and blocks for one of two ranks."""
    runtime = Runtime(Launch(0, 2, 0, 2), torch.device("cpu"), torch.float32)
    model = SSLModel(config)
    backbone = {key: value for key, value in vars(model.backbone).items() if isinstance(value, str | int)}
    return engine_config(config, runtime, 2, 1000), backbone, model.backbone.blocks[0].options


def blocks(config: Config) -> object:
    """Return the implementation of the blocks in bf16 on a CPU."""
    runtime, model = Runtime(Launch(0, 1, 0, 1), torch.device("cpu"), torch.bfloat16), SSLModel(config)
    prepare_blocks(model, config.engine, runtime)
    block = model.backbone.blocks[0]
    return block.options.implementation, "transform" in vars(block), block.options.linear.__module__


def gram(config: Config) -> object:
    """Return the Gram loss and the steps with a refresh."""
    batch = fixed_batch(config)
    targets = GramAnchor(config, random_features).targets(batch, 1.0)
    student = torch.randn(len(batch.global_crops), 16, 6, generator=draw(1))
    return float(targets(student, batch.masks.grid_mask)), [config.objective.gram.refresh.is_due(s) for s in range(20)]


def anchor(config: Config) -> object:
    """Return the anchor loss."""
    batch = fixed_batch(config)
    targets = StartAnchor(config, random_features).targets(batch, 1.0)
    cls, patches = (torch.randn(len(batch.global_crops), *shape, generator=draw(1)) for shape in ((6,), (16, 6)))
    return float(targets(cls, patches))


def random_features(crops: torch.Tensor, grid: tuple[int, int]) -> Features:
    patches = torch.randn(len(crops), grid[0] * grid[1], 6, generator=draw())
    return Features(patches[:, 0], patches[:, :0], patches)


def koleo_groups(config: Config) -> object:
    """Return the samples of a neighbour search on two ranks; the tests of the loss cover its values."""
    return config.objective.koleo.samples(config.data.micro_batch, 2)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


Probe = Callable[[Config], object]
SOFTMAX, SWIGLU = ["objective.centering=softmax"], ["model.mlp=swiglu"]
FEATURES = "teacher={kind: frozen, weights: somewhere, model: {dim: 24, num_heads: 2}}"
# a feature teacher has no heads, so theirs have the default sizes
DEFAULT_HEAD = "{prototypes: 65536, hidden: 2048, bottleneck: 256}"
DISTILLED = [FEATURES, *(f"objective.{loss}.head={DEFAULT_HEAD}" for loss in ("global_loss", "patch_loss"))]
COSINE = ["objective.patch_loss.kind=cosine"]
# what images of any channels can have
ANY_CHANNELS = [
    "crops.mean=[0.5]", "crops.std=[0.2]", "crops.jitter.probability=0", "crops.grey=0",
    "crops.solarize.global_probability=[0]",
]  # fmt: skip
# a key, another value, the function whose result changes, and further overrides that this requires
EFFECTS: list[tuple[str, str, Probe, list[str]]] = [
    ("run.steps", "10", steps, ["schedules.lr={kind: linear, peak: 1.0, end: 0.0}"]),
    ("run.seed", "1", batches, []),
    ("data.micro_batch", "2", batches, []),
    ("data.global_batch", "16", batches, []),
    ("data.window", "1", batches, []),
    ("data.lanes", "1", batches, []),
    ("data.channels", "4", losses, ANY_CHANNELS),
    ("data.dtype", "uint16", losses, ANY_CHANNELS),
    ("data.augmentations", "own_code:invert", batches, []),
    *((f"crops.{key}", value, batches, []) for key, value in {
        "global_count": "1", "global_size": "48", "global_scale": "[0.5, 0.6]", "local_count": "1", "local_size": "24",
        "local_scale": "[0.1, 0.2]", "sizes": "[{share: 1, global_size: 48}]", "aspect": "[1.0, 1.0]", "flip": "0.0",
        "flip_vertical": "0.5", "rotate90": "0.5", "brightness": "0.5", "contrast": "0.5", "noise": "0.2",
        "channel_dropout": "0.5",
        "jitter.probability": "0.0", "jitter.brightness": "0.0", "jitter.contrast": "0.0", "jitter.saturation": "0.0",
        "jitter.hue": "0.0", "grey": "1.0", "blur.sigma": "[0.1, 0.2]", "blur.global_probability": "[0.0]",
        "blur.local_probability": "0.0", "solarize.global_probability": "[1.0]",
    }.items()),
    ("crops.solarize.threshold", "64", batches, ["crops.solarize.global_probability=[1.0]"]),
    ("crops.value_range", "[10, 200]", losses, []),
    ("crops.mean", "[0.1, 0.2, 0.3]", losses, []),
    ("crops.std", "[0.1, 0.2, 0.3]", losses, []),
    *((f"masks.{key}", value, batches, []) for key, value in {
        "probability": "0.25", "ratio": "[0.4, 0.5]", "aspect": "[1.0, 1.0]", "group": "8",
    }.items()),
    *((f"model.{key}", value, losses, []) for key, value in {
        "patch_size": "4", "dim": "32", "depth": "1", "num_heads": "1", "mlp": "swiglu", "mlp_hidden": "24",
        "num_registers": "0", "layerscale": "0.1", "drop_path": "0.0", "qkv_bias": "false", "key_bias": "true",
        "norm_eps": "0.1", "rope_base": "10.0", "rope_rescale": "2.0", "rope_jitter": "2.0", "rope_shift": "0.5",
        "untied_norms": "local_cls",
    }.items()),
    ("model.channels", "4", losses, ANY_CHANNELS),
    ("model.lora.rank", "2", losses, []),
    *((f"model.lora.{key}", value, losses, ["model.lora.rank=2"]) for key, value in {
        "alpha": "1.0", "targets": "[qkv]", "blocks": "1", "free_blocks": "1",
    }.items()),
    ("model.preset", "vits16", local_norm, []),
    ("model.factory", "own_code:Backbone", losses, []),
    *((f"objective.{key}", value, losses, extra) for key, value, extra in (
        ("centering", "softmax", []), ("sinkhorn_iterations", "1", []), ("center_momentum", "0.0", SOFTMAX),
        ("student_temperature", "0.2", []), ("patch_loss.kind", "l2", []), ("patch_loss.reduction", "sum", COSINE),
        ("koleo.neighbours", "2", []), ("koleo.group_size", "2", ["objective.koleo.distributed=true"]),
    )),
    *((f"objective.{head}_loss.head.{key}", value, losses, []) for head in ("global", "patch") for key, value in {
        "prototypes": "30", "hidden": "14", "bottleneck": "6", "layers": "2",
    }.items()),
    *((f"objective.{term}.weight", "0.5", steps, [])
      for term in ("global_loss", "patch_loss", "koleo", "gram", "anchor")),
    ("objective.global_loss.local_weight", "0.5", steps, []),
    ("objective.koleo.distributed", "true", koleo_groups, []),
    ("objective.anchor.cls", "none", anchor, []),
    ("objective.anchor.patches", "cosine", anchor, []),
    ("objective.gram.size", "48", batches, []),
    ("objective.gram.level", "batch", gram, []),
    ("objective.gram.negatives", "drop", gram, []),
    ("objective.gram.tokens", "masked", gram, []),
    ("objective.gram.refresh.first", "7", gram, []),
    ("objective.gram.refresh.every", "3", gram, ["objective.gram.refresh.first=7"]),
    ("objective.gram.refresh.limit", "2", gram, ["objective.gram.refresh={first: 7, every: 3}"]),
    ("teacher.kind", "frozen", batches, ["teacher.weights=somewhere"]),
    ("teacher.model", "{dim: 20, num_heads: 1}", distilled, DISTILLED),
    ("teacher.loss", "smooth_l1", distilled, DISTILLED),
    ("teacher.projector_layers", "2", distilled, DISTILLED),
    ("teacher.projector_hidden", "5", distilled, [*DISTILLED, "teacher.projector_layers=2"]),
    *((f"optim.{key}", value, optimiser, []) for key, value in {
        "betas": "[0.5, 0.5]", "eps": "1e-4", "layer_decay": "0.5", "patch_embed_lr": "0.5",
    }.items()),
    ("optim.clip", "1.0", engine, []),
    ("optim.clip_per", "module", engine, []),
    ("optim.lr_scaling", "sqrt", steps, ["optim.lr_reference_batch=1024", "optim.lr_scaling=linear"]),
    ("optim.lr_reference_batch", "512", steps, ["optim.lr_reference_batch=1024", "optim.lr_scaling=linear"]),
    *((f"schedules.{key}", value, steps, []) for key, value in {
        "lr": "0.5", "weight_decay": "0.5", "momentum": "0.5", "teacher_temperature": "0.5", "freeze_last_layer": "3",
    }.items()),
    ("crops.window", "24", batches, []),
    ("engine.checkpointing", "none", engine, []),
    ("engine.compile", "on", blocks, []),
    ("engine.fp8", "true", blocks, []),
    ("engine.view_groups", "2", engine, []),
    ("engine.offload_checkpoints", "true", engine, []),
    ("engine.live_blocks", "5", engine, []),
    ("engine.moments", "disk", optimiser, []),
    ("engine.moments_ratio", "0.5", optimiser, ["engine.moments=host"]),
    ("engine.moments_dir", "FOLDER", optimiser, ["engine.moments=disk"]),
    ("init.freeze_backbone_steps", "3", steps, []),
]  # fmt: skip
# settings of speed, memory, paths and displays; runs that use every feature read them
READ = {
    "data.background", "data.cache.dir", "data.cache.downloads", "data.cache.limit", "data.decode_threads",
    "data.max_pixels",
    "data.max_unusable_share", "data.prefetch", "data.read_ahead_bytes", "data.reader_threads",
    "data.remote.deadline_seconds", "data.remote.stall_seconds", "data.shards", "engine.collective_timeout_seconds",
    "engine.cpu_kernels", "engine.cpu_threads", "engine.deterministic", "engine.device", "engine.dtype",
    "engine.hang_timeout_seconds", "engine.reduce_bucket_bytes",
    "evaluation.best", "evaluation.evaluators", "evaluation.every", "evaluation.images", "evaluation.max_share",
    "evaluation.reference", "evaluation.stop_if_below",
    "evaluation.test", "evaluation.train", "init.channels", "init.minimum_matched", "init.weights",
    "monitor.collapse.every",
    "monitor.collapse.images", "monitor.collapse.max_entropy", "monitor.collapse.min_entropy",
    "monitor.collapse.min_rank", "monitor.collapse.min_std", "monitor.collapse.min_usage", "monitor.collapse.start",
    "monitor.histogram_every", "monitor.panel_channels", "monitor.panel_every", "monitor.panel_samples",
    "monitor.peak_flops",
    "monitor.profile.start", "monitor.profile.steps", "monitor.progress", "monitor.project", "monitor.spike_score",
    "monitor.spike_window", "monitor.tensorboard", "monitor.trackers", "objective.chunk_bytes",
    "objective.gram.teacher", "run.checkpoint_every", "run.dir", "run.keep_every", "run.keep_last", "run.max_bad_steps",
    "run.save_in_background", "run.snapshot_every", "teacher.average", "teacher.chunk", "teacher.weights",
}  # fmt: skip
# a launcher reads it, which tests/cluster/test_hostfile.py shows
LAUNCHER = {"engine.environment"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("silent")
    pack(draw_folder(folder / "images", 40), folder / "set", PackOptions(shard_bytes=8_000))
    return folder


def test_every_setting_is_tested() -> None:
    tested = [key for key, *_ in EFFECTS]
    assert len(set(tested)) == len(tested) and not READ & set(tested)
    assert {*tested, *READ, *LAUNCHER} == {key for key, _ in walk_settings()}


@pytest.mark.parametrize("effect", EFFECTS, ids=lambda effect: effect[0])
def test_a_setting_changes_results(effect: tuple[str, str, Probe, list[str]], folder: Path, tmp_path: Path) -> None:
    key, value, probe, extra = effect
    raw = merge(BASE, {"data": {"shards": str(folder / "set")}, "run": {"dir": str(tmp_path)}})
    for override in extra if key != "teacher.kind" else []:
        raw = merge(raw, parse_override(override))
    changed = merge(raw, parse_override(f"{key}={value.replace('FOLDER', str(tmp_path / 'moments'))}"))
    if key == "teacher.kind":
        changed = merge(changed, parse_override(extra[0]))
    if key == "model.channels":
        # it follows the images
        changed = merge(changed, parse_override("data.channels=4"))
    if key == "model.preset":
        # keys given beside a preset replace the preset's values
        changed["model"] = {"preset": value}
        raw["model"] = {"preset": "vits16plus"}
    assert probe(build(raw)) != probe(build(changed))


# Runs the training command and prints the settings that the run reads. Reads by validators of the configuration, and
# by the table of hyperparameters, do not count: these read every setting, whether or not anything depends on it.
TRACE = """
import json, runpy, sys
from streamtrain.config.section import Section
read, plain = set(), Section.__getattribute__
def traced(self, name):
    if name in type(self).model_fields:
        code = sys._getframe(1).f_code
        in_validator = "/streamtrain/config/" in code.co_filename and code.co_name.startswith("_")
        in_table = code.co_filename.endswith("/streamtrain/config/recipes.py") and code.co_name == "leaves"
        if not in_validator and not in_table:
            read.add(f"{type(self).__name__}.{name}")
    return plain(self, name)
Section.__getattribute__ = traced
arguments, sys.argv = sys.argv[1:], sys.argv[1:]
try:
    runpy.run_path(arguments[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("READ" + json.dumps(sorted(read)))
"""


def read_by_run(words: list[str], root: Path = ROOT, **environment: str) -> set[str]:
    """Run the training command with the sources of ``root``; return ``Class.field`` of the settings that it reads."""
    words = [str(root / "streamtrain" / "main.py"), *words[1:]]
    done = subprocess.run(
        [sys.executable, "-c", TRACE, *words], cwd=root, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(root), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return set(json.loads(done.stdout.rpartition("READ")[2]))


@pytest.mark.slow
def test_a_run_reads_the_settings_without_effect_on_results(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")

    def run(name: str, *overrides: str) -> set[str]:
        words = command(folder / "set", tmp_path / name, "run.steps=1", "monitor.tensorboard=true", *overrides)
        return read_by_run(words, MLFLOW_TRACKING_URI=(tmp_path / "mlflow").as_uri(), MLFLOW_ALLOW_FILE_STORE="true")

    backbone = tiny_weights(tmp_path / "weights")
    labelled, tested = class_folder(tmp_path / "labelled"), class_folder(tmp_path / "tested")
    monitored = ("monitor.profile.start=1", "monitor.trackers=[mlflow]", "evaluation.every=1",
                 "evaluation.best=knn_20", f"evaluation.train={labelled}", f"evaluation.test={tested}",
                 f"evaluation.reference={labelled}", "evaluation.stop_if_below=0.01")  # fmt: skip
    pretrained = (f"init.weights={backbone}", f"objective.gram.teacher={backbone}", "objective.gram.weight=1.0")
    read = run("first", *pretrained, *monitored)
    with faulty_server(folder) as server:
        cached = [f"data.shards={server.url}/set", f"data.cache={{dir: {tmp_path / 'cache'}, limit: 1MB}}"]
        read |= run("second", "teacher.kind=frozen", f"teacher.weights={tmp_path / 'first'}", *cached)
    assert list((tmp_path / "cache").glob("*.shard"))
    sections = {name: type(getattr(Config(), name)).__name__ for name in Config.model_fields}
    sections |= {"objective.gram": "GramConfig", "data.cache": "CacheConfig", "data.remote": "RemoteConfig"}
    sections |= {"monitor.collapse": "CollapseConfig", "monitor.profile": "ProfileConfig"}
    expected = {f"{sections[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}" for key in READ}
    assert expected <= read, expected - read


@pytest.mark.slow
def test_the_trace_finds_settings_that_nothing_uses(folder: Path, tmp_path: Path) -> None:
    """The copy of the sources has a setting that nothing reads, and one that only a validator reads."""
    root = tmp_path / "checkout"
    for name in ("shards", "streamtrain", "configs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    module = root / "streamtrain" / "config" / "monitor.py"
    source, anchor = module.read_text(), "    tensorboard: bool = free("
    assert source.count(anchor) == 1
    mutant = (
        '    unused: int = free(1, "Nothing reads it.")\n'
        '    checked: int = free(1, "Only a validator reads it.")\n\n'
        '    @model_validator(mode="after")\n'
        "    def _check(self) -> MonitorConfig:\n"
        "        assert self.checked == 1\n"
        "        return self\n\n"
    )
    module.write_text(source.replace(anchor, mutant + anchor))
    words = command(folder / "set", tmp_path / "run", "run.steps=1", "monitor.tensorboard=true")
    read = read_by_run(words, root)
    assert {"MonitorConfig.tensorboard", "RunConfig.steps"} <= read
    assert not {"MonitorConfig.unused", "MonitorConfig.checked"} & read
