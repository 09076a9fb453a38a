"""Layout of the source: layers, torch-free packages, file names and sizes."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("shards", "streamtrain", "tools")
TORCH_FREE = (
    "shards", "streamtrain.errors", "streamtrain.config", "streamtrain.planning", "streamtrain.run",
    "streamtrain.checkpoint.retention", "streamtrain.data.stream",
)  # fmt: skip
MAX_LINES = 430


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def test_imports_follow_the_layers() -> None:
    """The contracts are in ``pyproject.toml``."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_torch_free_packages_load_without_torch() -> None:
    """In a fresh interpreter, since an import of an import counts too."""
    names = [name for name in SOURCES if any(name == free or name.startswith(f"{free}.") for free in TORCH_FREE)]
    code = f"import {', '.join(names)}, sys; assert not {{'torch', 'deepspeed'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_command_line_loads_torch_before_it_is_parsed() -> None:
    """``--help`` and a mistyped argument are answered at once."""
    scripts = [path.stem for path in sorted((ROOT / "tools").glob("*.py"))]
    code = f"import {', '.join(scripts)}, streamtrain.main, sys\n"
    code += "from streamtrain.cli.main import COMMANDS, build_parser\nbuild_parser(COMMANDS)\n"
    code += "assert not {'torch', 'deepspeed', 'matplotlib'} & set(sys.modules)"
    paths = os.pathsep.join(map(str, (ROOT / "tools", ROOT)))
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_import_changes_the_path_of_modules() -> None:
    """Only scripts set ``sys.path``, and the import of the user's own code."""
    names = [name for name in SOURCES if name.partition(".")[0] in ("shards", "streamtrain")]
    code = f"import sys; before = list(sys.path)\nimport {', '.join(names)}\nassert sys.path == before"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    patching = [name for name, path in SOURCES.items() if "sys.path" in path.read_text()]
    assert set(patching) <= {
        "streamtrain.main",
        "streamtrain.cli.hosts",
        "streamtrain.config.user_code",
        "tools.bench",
        "tools.gpu_acceptance",
    }


def test_scripts_of_commands_are_thin() -> None:
    """Each subcommand that has a script in tools/ is called by it, in at most ten lines."""
    scripts = [path for path in (ROOT / "tools").glob("*.py") if "argv.insert(1" in path.read_text()]
    assert len(scripts) == 8 and all(len(path.read_text().splitlines()) <= 10 for path in scripts)


def test_no_module_has_a_vague_name() -> None:
    vague = {"util", "utils", "helper", "helpers", "common", "misc"}
    assert not [name for name in SOURCES if name.split(".")[-1] in vague]


def test_no_module_beside_main_hides_a_library() -> None:
    """`deepspeed streamtrain/main.py` puts streamtrain/ first on sys.path."""
    libraries = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions()) - set(PACKAGES)
    beside_main = {p.stem for p in (ROOT / "streamtrain").iterdir() if p.suffix == ".py" or p.is_dir()}
    assert not (beside_main - {"__init__", "__pycache__"}) & libraries


def test_no_file_is_too_long() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in SOURCES.items()}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_file_contains_a_path_of_one_machine() -> None:
    machine = re.compile(rf"(?<![\w.])/(home|Users|root|mnt)/\w|{re.escape(str(ROOT))}/")
    texts = [p for s in ("py", "sh", "md", "yaml", "ini", "toml", "cff") for p in ROOT.glob(f"*.{s}")]
    for folder in (*PACKAGES, "configs", "tests", "docs"):
        texts += [p for s in ("py", "sh", "md", "yaml") for p in (ROOT / folder).rglob(f"*.{s}")]
    assert not [str(path) for path in texts if machine.search(path.read_text(encoding="utf-8"))]
