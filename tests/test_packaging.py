"""The wheel and the source distribution: contents, recipes, kernels, and every command in an empty environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from cpu_kernels import needs_kernels
from tiny_backbone import class_folder
from tiny_run import command

from streamtrain import __version__
from streamtrain.evaluation.reference_curve import stored_curves
from streamtrain.ops.cpu import build

ROOT = Path(__file__).resolve().parents[1]
PRESETS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))

KERNELS = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "streamtrain" / "ops" / "cpu").iterdir()
    if path.suffix in (".cpp", ".h")
}
CURVES = {path.relative_to(ROOT).as_posix() for path in stored_curves()}

LOAD_ALL = """
import sys
from pathlib import Path

import streamtrain
from streamtrain.config.load import load_config

assert Path(streamtrain.__file__).is_relative_to(sys.argv[1]), streamtrain.__file__
for name in sys.argv[2:]:
    load_config(name, [])
"""


def load_all(source: Path, working_folder: Path) -> None:
    """Load every recipe by its bare name in another folder, importing from ``source``."""
    environment = {**os.environ, "PYTHONPATH": str(source)}
    command = [sys.executable, "-c", LOAD_ALL, str(source), *PRESETS]
    done = subprocess.run(command, cwd=working_folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy to build from, so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for folder in ("shards", "streamtrain", "configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "LICENSE", "CITATION.cff"):
        shutil.copy(ROOT / name, source / name)
    for path in ROOT.glob("*.md"):
        shutil.copy(path, source)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(output)]
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = output.glob("*.whl")
    return built


def test_the_wheel_has_both_packages_with_types_and_every_recipe(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"streamtrain/configs/{preset}" for preset in PRESETS} <= names
    for package in ("shards", "streamtrain"):
        modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
        assert modules <= names, "list the package in tool.setuptools.packages of pyproject.toml"
        assert f"{package}/py.typed" in names
    assert KERNELS and names >= KERNELS
    assert CURVES and names >= CURVES
    assert not [name for name in names if name.startswith(("tests/", "tools/", "configs/"))]
    assert any(name.endswith("LICENSE") for name in names)


def test_the_wheel_has_the_version_and_the_command(wheel: Path) -> None:
    assert wheel.name.startswith(f"streamtrain-{__version__}-")
    archive = zipfile.ZipFile(wheel)
    (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "streamtrain = streamtrain.cli.main:main" in archive.read(entry_points).decode()
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text()


def test_the_source_distribution_has_everything_that_the_wheel_needs(source: Path, tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert KERNELS | CURVES | {f"configs/{preset}" for preset in PRESETS} <= names
    assert {"pyproject.toml", "CHANGELOG.md", "shards/py.typed", "streamtrain/py.typed"} <= names


@needs_kernels
def test_the_kernels_of_the_wheel_are_those_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """The name of the library is a digest of its sources, so the wheel and the checkout share one compilation."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    assert build.is_enabled(torch.float32)
    code = "import torch; from streamtrain.ops.cpu import build; assert build.is_enabled(torch.float32)"
    code += "; print(build.__file__, build.library_name())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    installed = tmp_path / "streamtrain" / "ops" / "cpu" / "build.py"
    assert done.stdout.split() == [str(installed), build.library_name()], done.stderr


def test_presets_are_found_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    (tmp_path / "elsewhere").mkdir()
    load_all(tmp_path / "installed", tmp_path / "elsewhere")


def test_presets_are_found_from_the_checkout(tmp_path: Path) -> None:
    load_all(ROOT, tmp_path)


def use_every_command(bin_folder: Path, folder: Path) -> None:
    """Pack, verify, plan, train two steps, evaluate and export with the installed command, outside the checkout."""
    class_folder(folder / "images", each=10)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RANK")}

    def streamtrain(*words: str) -> str:
        ended = subprocess.run(
            [bin_folder / "streamtrain", *words], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, f"{words}: {ended.stderr[-3000:]}"
        return ended.stdout

    assert streamtrain("--version") == f"streamtrain {__version__}\n"
    streamtrain("pack", "--src", "images", "--out", "set")
    assert "no faults" in streamtrain("verify", "set")
    assert "fits" in streamtrain("plan", "--config", "vits16.yaml", "--gpus", "1", "--gpu-memory", "80GB")
    words = command("set", Path("run"), "data.global_batch=8", "run.steps=2")[1:]
    streamtrain("train", *words)
    streamtrain("train", "--ranks", "2", *words, "run.steps=3")
    assert "kNN accuracy" in streamtrain("evaluate", "knn", "--run", "run", "--train", "set")
    streamtrain("report", "--run", "run")
    streamtrain("export", "--run", "run", "--to", "safetensors", "--out", "exported")
    assert (folder / "exported" / "model.safetensors").is_file() and (folder / "run" / "report.html").is_file()


def make_environment(folder: Path, wheel: Path, pip_options: Sequence[str]) -> Path:
    """Create a virtual environment with the wheel, and return its folder of commands."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pip_options, wheel],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "bin"


@pytest.mark.slow
def test_the_installed_wheel_runs_every_command_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """The environment has this one's libraries, but neither the checkout nor its editable installation."""
    bin_folder = make_environment(tmp_path / "venv", wheel, ["--no-deps"])
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "streamtrain" not in path.name and not (packages / path.name).exists():
            (packages / path.name).symlink_to(path)
    use_every_command(bin_folder, tmp_path)


@pytest.mark.slow
def test_the_requirements_of_the_wheel_suffice_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    # DALI decodes on the CPU with either of its builds
    torch_index = os.environ.get("STREAMTRAIN_TORCH_INDEX")
    options = []
    if torch_index is not None:
        options = ["--find-links" if Path(torch_index).is_dir() else "--extra-index-url", torch_index]
    bin_folder = make_environment(tmp_path / "venv", Path(f"{wheel}[cu13]"), options)
    use_every_command(bin_folder, tmp_path)
