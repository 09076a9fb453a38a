"""The presets are found from a checkout and from an installed wheel alike."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRESETS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))

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
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that the checkout stays clean."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("shards", "streamtrain", "configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
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
    assert not [name for name in names if name.startswith(("tests/", "tools/", "configs/"))]
    assert any(name.endswith("LICENSE") for name in names)


def test_presets_are_found_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    (tmp_path / "elsewhere").mkdir()
    load_all(tmp_path / "installed", tmp_path / "elsewhere")


def test_presets_are_found_from_the_checkout(tmp_path: Path) -> None:
    load_all(ROOT, tmp_path)
