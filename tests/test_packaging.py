"""The presets are found from a checkout and from an installed wheel alike."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from cpu_kernels import needs_kernels

from streamtrain.ops.cpu import build

ROOT = Path(__file__).resolve().parents[1]
PRESETS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))

KERNELS = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "streamtrain" / "kernels").iterdir()
    if path.suffix in (".cpp", ".h")
}

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
    """Loads every preset by its bare name, with only `source` to import from, in another folder."""
    environment = {**os.environ, "PYTHONPATH": str(source)}
    command = [sys.executable, "-c", LOAD_ALL, str(source), *PRESETS]
    done = subprocess.run(command, cwd=working_folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build from, so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for folder in ("shards", "streamtrain", "configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "MANIFEST.in", "README.md", "LICENSE", "CITATION.cff", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, source / name)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(output)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (built,) = output.glob("*.whl")
    return built


def test_the_wheel_holds_both_packages_and_every_preset(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"streamtrain/configs/{preset}" for preset in PRESETS} <= names
    for package in ("shards", "streamtrain"):
        modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
        assert modules <= names
    assert names >= KERNELS
    assert not [name for name in names if name.startswith(("tests/", "tools/", "configs/"))]
    assert any(name.endswith("LICENSE") for name in names)


def test_the_source_distribution_holds_what_a_wheel_is_made_of(source: Path, tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert KERNELS | {f"configs/{preset}" for preset in PRESETS} <= names


@needs_kernels
def test_the_kernels_of_the_wheel_are_those_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """The library's name is a digest of its sources, so that one compilation serves both."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    assert build.is_enabled(torch.float32)
    code = "import torch; from streamtrain.ops.cpu import build; assert build.is_enabled(torch.float32)"
    code += "; print(build.__file__, build._library())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    installed = tmp_path / "streamtrain" / "kernels" / "build.py"
    assert done.stdout.split() == [str(installed), str(build._library())], done.stderr


def test_presets_are_found_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    (tmp_path / "elsewhere").mkdir()
    load_all(tmp_path / "installed", tmp_path / "elsewhere")


def test_presets_are_found_from_the_checkout(tmp_path: Path) -> None:
    load_all(ROOT, tmp_path)
