"""Feature distillation: a student learns from a backbone without heads, of another width and patch size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from commands import run_command
from drawn_images import draw_folder
from ranks import ROOT, run_ranks
from safetensors.torch import save_file
from tiny_backbone import tiny_backbone, tiny_weights
from tiny_run import kill_and_resume, logged

from shards.packing.pack import PackOptions, pack
from streamtrain.checkpoint import reader as checkpoint
from streamtrain.config.load import build, load_config, open_shard_set
from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch, normalise
from streamtrain.data.loader import Loader
from streamtrain.errors import ConfigError, StreamtrainError
from streamtrain.interop.feature_teacher import check_stated_model, describe_backbone, with_teacher_model
from streamtrain.interop.load import load_backbone
from streamtrain.model.initialise import initialise
from streamtrain.objective.targets import TargetMaker, TeacherPrototypes
from streamtrain.planning.flops import step_flops
from streamtrain.planning.memory import plan
from streamtrain.planning.shapes import parameter_shapes
from streamtrain.training.feature_teacher import FeatureTeacher, describe_teacher
from streamtrain.training.ssl_model import LossWeights, SSLModel

STUDENT = {"preset": None, "patch_size": 8, "dim": 16, "depth": 2, "num_heads": 2}
CROPS = {"global_size": [24, 40], "local_size": 16, "local_count": 1}
# another width, depth, MLP and patch size than the student's
TEACHER = {"patch_size": 4, "dim": 48, "depth": 1, "num_heads": 3, "mlp": "swiglu", "mlp_hidden": 40}


def settings(weights: Path, **sections: Any) -> Config:
    """Return the settings of a tiny student, with the shape of the teacher in ``weights``."""
    raw = {"model": STUDENT, "crops": CROPS, "teacher": {"kind": "frozen", "weights": str(weights)}}
    raw["data"] = {"micro_batch": 3, "lanes": 2, "decode_threads": 1}
    raw |= {name: {**raw.get(name, {}), **values} for name, values in sections.items()}
    return with_teacher_model(build(raw))


def words(shards: Path, run_dir: Path, weights: Path, *overrides: str) -> list[str]:
    """Return the command of a rank of a tiny student; ``overrides`` come last."""
    student = [f"model.{key}={'null' if value is None else value}" for key, value in STUDENT.items()]
    return [
        str(ROOT / "streamtrain" / "main.py"), "--config", "distil_features.yaml", *student,
        *(f"crops.{key}={value}" for key, value in CROPS.items()), f"data.shards={shards}", f"run.dir={run_dir}",
        f"teacher.weights={weights}", "data.micro_batch=4", "data.lanes=2", "data.decode_threads=1",
        "engine.cpu_threads=1", "engine.device=cpu", "engine.dtype=fp32", "monitor.progress=false",
        "monitor.tensorboard=false", "run.checkpoint_every=1", "run.keep_last=0",
        "schedules.lr={kind: constant, peak: 3e-3, end: null, warmup: 0}", *overrides,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set and a teacher of another shape than the student."""
    folder = tmp_path_factory.mktemp("features")
    pack(draw_folder(folder / "images", 24), folder / "set", PackOptions())
    tiny_weights(folder / "teacher", **TEACHER)
    return folder


def first_batch(config: Config, folder: Path) -> Batch:
    data = config.data.model_copy(update={"shards": str(folder / "set")})
    config = config.model_copy(update={"data": data})
    with Loader(open_shard_set(config), config, rank=0, world_size=1, device="cpu") as loader:
        return next(loader)


def test_shapes_and_plan_have_a_projector_and_no_prototypes(folder: Path) -> None:
    config = settings(folder / "teacher", teacher={"projector_layers": 2, "projector_hidden": 20})
    expected = {name: tuple(value.shape) for name, value in SSLModel(config).named_parameters()}
    assert parameter_shapes(config) == expected and list(parameter_shapes(config)) == list(expected)
    heads = {name: shape for name, shape in expected.items() if not name.startswith("backbone.")}
    assert heads == {
        "projector.layers.0.weight": (20, 16), "projector.layers.0.bias": (20,), "projector.layers.1.weight": (48, 20),
        "projector.layers.1.bias": (48,),
    }  # fmt: skip
    planned = plan(config, 2, on_gpu=False, bf16=False)
    parts = {part.name: part.num_bytes for part in planned.parts}
    teacher = sum(value.numel() for value in tiny_backbone(**TEACHER).model.parameters())
    # each parameter is split into two shards, with up to one value of padding
    assert 2 * teacher <= parts["feature teacher"] <= 2 * teacher + 4 * 40
    assert {"projector", "feature loss", "teacher features", "resized patches"} <= parts.keys()
    assert not [name for name in parts if "prototype" in name or "patch" in name.split()]
    wide = {**config.teacher.model, "dim": 96} if config.teacher.model else {}
    larger = config.model_copy(update={"teacher": config.teacher.model_copy(update={"model": wide})})
    assert step_flops(larger, 1).model > step_flops(config, 1).model
    assert plan(larger, 2).all_gather_bytes_per_step > plan(config, 2).all_gather_bytes_per_step


def test_the_teacher_sees_its_own_normalisation_and_its_patches_are_resized(folder: Path) -> None:
    config = settings(folder / "teacher", crops={"mean": [0.1, 0.2, 0.3]})
    batch, backbone = first_batch(config, folder), load_backbone(folder / "teacher")
    network = FeatureTeacher(config, describe_teacher(config))
    network.backbone.load_state_dict(backbone.model.state_dict())
    features = network("teacher_features", batch, LossWeights())
    pixels = normalise(batch.global_crops, backbone.config.mean, backbone.config.std, torch.float32)
    expected = backbone.forward_features(pixels)
    assert features.global_features is not None and features.patch_features is not None
    torch.testing.assert_close(features.global_features, expected.cls)
    # 6 x 10 patches of the teacher, 3 x 5 of the student
    image = expected.patches.unflatten(1, (6, 10)).permute(0, 3, 1, 2)
    resized = F.interpolate(image, size=(3, 5), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(features.patch_features, resized)


@pytest.mark.parametrize("loss", ["cosine", "smooth_l1"])
def test_every_parameter_of_the_student_has_a_gradient_and_the_losses_their_names(loss: str, folder: Path) -> None:
    config = settings(folder / "teacher", teacher={"loss": loss}, objective={"koleo": {"weight": 0.1}})
    batch, model, network = (
        first_batch(config, folder),
        SSLModel(config),
        FeatureTeacher(config, describe_teacher(config)),
    )
    initialise(model, config.model, seed=0)
    network.backbone.load_state_dict(load_backbone(folder / "teacher").model.state_dict())
    weights = LossWeights(global_loss=0.5, patch_loss=2.0, koleo=0.1, local_loss=0.25)
    features = network("teacher_features", batch, weights)
    (targets,) = TargetMaker(config.objective).make([features], TeacherPrototypes(None, None), 0.07)
    losses = model("student_losses", batch, targets, weights)
    assert losses.keys() == {"total", "distil_cls", "distil_local", "distil_patch", "koleo"}
    factors = {"distil_cls": 0.5, "distil_local": 0.125, "distil_patch": 2.0, "koleo": 0.1}
    expected = sum(factor * losses[name] for name, factor in factors.items())
    torch.testing.assert_close(losses["total"].detach(), expected)
    losses["total"].backward()
    unused = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    # no patch is masked
    assert unused == ["backbone.embedding.mask_token"]
    # a term of weight 0 is left out
    only_patches = model("student_losses", batch, targets, LossWeights(global_loss=0.0, koleo=0.0))
    assert only_patches.keys() == {"total", "distil_patch"}


def test_a_file_of_meta_states_its_shape_by_its_tensors(tmp_path: Path) -> None:
    state = {
        "cls_token": torch.zeros(1, 1, 32), "storage_tokens": torch.zeros(1, 4, 32), "mask_token": torch.zeros(1, 32),
        "patch_embed.proj.weight": torch.ones(32, 3, 14, 14), "patch_embed.proj.bias": torch.zeros(32),
        "rope_embed.periods": torch.ones(4), "norm.weight": torch.ones(32), "norm.bias": torch.zeros(32),
        "local_cls_norm.weight": torch.ones(32), "local_cls_norm.bias": torch.zeros(32),
    }  # fmt: skip
    for index in range(3):
        block = {f"{part}.{kind}": (32,) for part in ("norm1", "norm2") for kind in ("weight", "bias")}
        block |= {"attn.qkv.weight": (96, 32), "attn.qkv.bias": (96,), "attn.qkv.bias_mask": (96,)}
        block |= {"attn.proj.weight": (32, 32), "attn.proj.bias": (32,), "ls1.gamma": (32,), "ls2.gamma": (32,)}
        block |= {"mlp.w1.weight": (40, 32), "mlp.w1.bias": (40,), "mlp.w2.weight": (40, 32), "mlp.w2.bias": (40,)}
        block |= {"mlp.w3.weight": (32, 40), "mlp.w3.bias": (32,)}
        state |= {f"blocks.{index}.{name}": torch.ones(shape) for name, shape in block.items()}
    torch.save(state, tmp_path / "dinov3.pth")
    model = describe_backbone(tmp_path / "dinov3.pth").model
    assert (model.patch_size, model.dim, model.depth, model.num_heads, model.mlp, model.hidden) == (
        14, 32, 3, 2, "swiglu", 40,
    )  # fmt: skip
    assert model.num_registers == 4 and model.untied_norms == "local_cls" and model.qkv_bias and not model.key_bias
    config = settings(tmp_path / "dinov3.pth", crops={"global_size": 56}, model={"patch_size": 8})
    assert config.teacher.backbone == model
    del state["rope_embed.periods"]
    torch.save(state, tmp_path / "heads.pth")
    with pytest.raises(StreamtrainError, match=r"heads.pth does not state its number of attention heads; set teacher"):
        describe_backbone(tmp_path / "heads.pth")
    # the caller may state the shape
    assert describe_backbone(tmp_path / "heads.pth", model=model).model == model


def test_weights_that_state_another_function_are_refused_though_their_tensors_fit(tmp_path: Path) -> None:
    weights = tiny_weights(tmp_path / "weights")
    model = tiny_backbone().config.model
    check_stated_model(weights, model, "init.weights")
    other = model.model_copy(update={"num_heads": 1, "rope_base": 10.0})
    with pytest.raises(ConfigError, match=r"^init.weights: .* model.num_heads 2, not 1, model.rope_base 100.0, not 10"):
        check_stated_model(weights, other, "init.weights")
    # a file of tensors alone states neither
    save_file({"blocks.0.norm1.weight": torch.ones(32)}, tmp_path / "alone.safetensors")
    check_stated_model(tmp_path / "alone.safetensors", other, "init.weights")


def test_wrong_teachers_end_in_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "dinov2").mkdir()
    dinov2 = {f"encoder.layer.0.attention.attention.{part}.weight": torch.ones(8, 8) for part in ("query", "key")}
    save_file({"embeddings.position_embeddings": torch.ones(1, 5, 8), **dinov2}, tmp_path / "dinov2/model.safetensors")
    (tmp_path / "dinov2" / "config.json").write_text(json.dumps({"model_type": "dinov2", "hidden_size": 8}))
    odd = {"model": {"patch_size": 4}, "crops": {"global_size": [32, 36]}}
    head = {"global_loss": {"head": {"prototypes": 64}}, "student_temperature": 0.2}
    for weights, sections, message in (
        (tmp_path / "absent", {}, "teacher.weights: there is no file or folder"),
        (tmp_path / "empty", {}, "empty"),
        (tmp_path / "dinov2", {}, "position embeddings"),
        (tiny_weights(tmp_path / "odd"), odd, "global crops of 32x36 pixels are not a multiple of the patches of 8"),
        (folder / "teacher", {"objective": head}, "objective.student_temperature, objective.global_loss.head;"),
        (folder / "teacher", {"objective": {"patch_loss": {"kind": "l2"}}}, "no effect: objective.patch_loss.kind;"),
        (folder / "teacher", {"schedules": {"teacher_temperature": 0.1}}, "no effect: schedules.teacher_temperature;"),
        (folder / "teacher", {"teacher": {"projector_hidden": 9}}, "only with projector_layers above 1"),
    ):  # fmt: skip
        with pytest.raises(StreamtrainError) as error:
            settings(weights, **sections)
        assert message in str(error.value) and "\n" not in str(error.value), error.value
    with pytest.raises(StreamtrainError, match=r"needs teacher\.weights, a run directory or a backbone"):
        with_teacher_model(load_config("distil_features.yaml"))


def test_a_complete_run_needs_no_teacher_and_logs_no_temperature(folder: Path, tmp_path: Path) -> None:
    weights = Path(shutil.copytree(folder / "teacher", tmp_path / "teacher"))

    def train(steps: int, *overrides: str) -> tuple[int, str, str]:
        ((code, out, err),) = run_ranks(
            words(folder / "set", tmp_path / "run", weights, f"run.steps={steps}", *overrides), 1
        )
        return code, out, err.strip()

    code, _, errors = train(1)
    assert code == 0, errors
    (record,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert "teacher/momentum" in record and "teacher/temperature" not in record and record["loss/distil_cls"] > 0
    shutil.rmtree(weights)
    code, out, _ = train(1)
    assert code == 0 and out.strip().endswith("raise run.steps (now 1) to continue"), out
    code, _, errors = train(1, "teacher.projector_layers=2")
    assert code == 2 and "teacher.projector_layers is 2, the checkpoint has 1" in errors.splitlines()[-1]


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit_and_its_student_is_exported(folder: Path, tmp_path: Path) -> None:
    def command(run: str) -> list[str]:
        return words(folder / "set", tmp_path / run, folder / "teacher", "run.steps=6", "model.drop_path=0.2")

    results = run_ranks(command("straight"), 2)
    assert [code for code, _, _ in results] == [0, 0], results[0][2][-3000:]
    kill_and_resume(command("broken"), tmp_path / "broken", 3)
    straight, broken = logged(tmp_path / "straight"), logged(tmp_path / "broken")
    assert straight == broken and list(straight) == list(range(1, 7))
    for which in ("student", "teacher"):
        ours, theirs = (checkpoint.read_weights(tmp_path / run, 6, which) for run in ("straight", "broken"))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert ours["projector.layers.0.weight"].shape == (48, 16)
    # the export is the student's EMA, without the projector
    done = run_command("export", "--run", tmp_path / "straight", "--to", "safetensors", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    average = checkpoint.read_weights(tmp_path / "straight", 6)["backbone.norm.weight"]
    assert torch.equal(load_backbone(tmp_path / "out").model.norm.weight, average)


def transformers_teacher(folder: Path) -> Path:
    """Save a random DINOv3 ViT of transformers whose features differ between patches and images."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    generator = torch.Generator().manual_seed(0)
    model = transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(
            patch_size=8, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3,
            num_register_tokens=2, image_size=32,
        )
    )  # fmt: skip
    for name, value in model.requires_grad_(False).named_parameters():
        if "lambda1" in name:
            value.uniform_(0.3, 0.7, generator=generator)
        elif value.dim() > 1 and "token" not in name:
            value.normal_(0, value[0].numel() ** -0.5, generator=generator)
        elif "norm" not in name:
            value.normal_(0, 0.2, generator=generator)
    model.save_pretrained(folder)
    return folder


def constant_cosine(config: Config, folder: Path) -> float:
    """Return the mean cosine of the best constant to the teacher's patches of the first images."""
    network, teacher = (
        FeatureTeacher(config, describe_teacher(config)),
        load_backbone(Path(str(config.teacher.weights))),
    )
    network.backbone.load_state_dict(teacher.model.state_dict())
    features = network("teacher_features", first_batch(config, folder), LossWeights()).patch_features
    return float(F.normalize(features, dim=1).mean(0).norm())


@pytest.mark.slow
def test_a_student_learns_the_patches_of_a_transformers_folder(folder: Path, tmp_path: Path) -> None:
    weights = transformers_teacher(tmp_path / "hf")
    pack(draw_folder(tmp_path / "images", 200, ("a", "b")), tmp_path / "set", PackOptions())
    given = ("run.steps=300", "model.dim=32", "data.micro_batch=8", "run.checkpoint_every=0")
    results = run_ranks(words(tmp_path / "set", tmp_path / "run", weights, *given), 1)
    assert results[0][0] == 0, results[0][2][-3000:]
    cosine = {step: 1 - record["loss/distil_patch"] for step, record in logged(tmp_path / "run").items()}
    print("patch cosine:", {step: round(cosine[step], 3) for step in (1, 2, 5, 10, 20, 50, 100, 200, 300)})
    # a constant reaches only half of it
    constant = constant_cosine(settings(weights, data={"micro_batch": 32}), tmp_path)
    print("best constant:", round(constant, 3))
    assert abs(cosine[1]) < 0.1 and min(cosine[step] for step in range(250, 301)) > 0.8 > constant + 0.2

    done = run_command("evaluate", "knn", "--run", tmp_path / "run", "--train", tmp_path / "images", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["feature_dim"] == 32
    done = run_command("export", "--run", tmp_path / "run", "--to", "hf", "--out", tmp_path / "out")
    assert done.returncode == 0 and load_backbone(tmp_path / "out").config.model.dim == 32, done.stderr


@pytest.mark.slow
def test_one_and_two_ranks_agree(folder: Path, tmp_path: Path) -> None:
    given = ("run.steps=5", "data.global_batch=8", "teacher.loss=smooth_l1")
    for ranks in (1, 2):
        results = run_ranks(words(folder / "set", tmp_path / str(ranks), folder / "teacher", *given), ranks)
        assert all(code == 0 for code, _, _ in results), results[0][2][-3000:]
    one, two = logged(tmp_path / "1"), logged(tmp_path / "2")
    assert one.keys() == two.keys()
    for step, record in one.items():
        assert record == pytest.approx(two[step], rel=1e-4, abs=1e-5), step
