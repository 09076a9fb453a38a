"""The plan of the house: every file imports only from its own room and from the floors below it."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up. A floor is a tuple of rooms, a room a tuple of module prefixes.
FLOORS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("shards",),),
    (
        (
            "streamtrain.errors", "streamtrain.config", "streamtrain.schedules", "streamtrain.presets",
            "streamtrain.terminal",
        ),
        ("streamtrain.kernels",),
    ),
    (("streamtrain.data",), ("streamtrain.model",), ("streamtrain.objective",)),
    (("streamtrain.learner",),),
    (("streamtrain.engine",),),
    (
        (
            "streamtrain.run_folder", "streamtrain.stopping", "streamtrain.durable", "streamtrain.manifest",
            "streamtrain.retention", "streamtrain.host_memory", "streamtrain.environment", "streamtrain.guards",
            "streamtrain.checkpoint", "streamtrain.saver",
        ),
    ),
    (("streamtrain.monitor",), ("streamtrain.evaluation",), ("streamtrain.export",), ("streamtrain.watch",)),
    (("streamtrain.networks", "streamtrain.gram_anchor", "streamtrain.distillation", "streamtrain.observer"),),
    (("streamtrain.train",),),
    (("streamtrain.main",), ("tools",)),
)
ROOMS = {prefix: (floor, room) for floor, rooms in enumerate(FLOORS) for room in rooms for prefix in room}
OURS = ("shards", "streamtrain", "tools")
TORCH_FREE = (
    "shards", *FLOORS[1][0], "streamtrain.engine.memory", "streamtrain.engine.flops", "streamtrain.engine.peak",
    "streamtrain.run_folder", "streamtrain.stopping",
    "streamtrain.durable", "streamtrain.manifest", "streamtrain.retention", "streamtrain.host_memory",
    "streamtrain.environment", "streamtrain.guards", "streamtrain.data.stream",
)  # fmt: skip
MAX_LINES = 430


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for package in OURS for path in sorted((ROOT / package).rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, at any depth; `from a import b` counts as `a.b`."""
    names: set[str] = set()
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names.update(f"{prefix}.{alias.name}" for alias in node.names)
    return names


def is_under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def room_of(name: str) -> tuple[int, tuple[str, ...]] | None:
    return next((place for prefix, place in ROOMS.items() if is_under(name, (prefix,))), None)


@pytest.mark.parametrize("name", [name for name, path in SOURCES.items() if path.name != "__init__.py"])
def test_imports_only_from_its_room_and_from_below(name: str) -> None:
    # Scripts of tools/ import one another by bare name, since a script's own folder is on sys.path.
    siblings = {path.stem for path in (ROOT / "tools").glob("*.py")} if name.startswith("tools.") else set()
    place = room_of(name)
    assert place is not None, f"{name} stands in no room of the plan"
    floor, room = place
    for imported in imports(SOURCES[name]):
        top = imported.split(".")[0]
        if top in siblings or top not in OURS:
            continue
        target = room_of(imported)
        assert target is not None, f"{name} imports {imported}, which stands in no room of the plan"
        assert target[1] == room or target[0] < floor, f"{name} (floor {floor}) imports {imported}"


def test_only_the_engine_imports_deepspeed() -> None:
    importers = {
        name for name, path in SOURCES.items() if any(is_under(i, ("deepspeed",)) for i in imports(path))
    }
    assert not [name for name in importers if not is_under(name, ("streamtrain.engine",))]


def test_the_objective_needs_torch_and_of_the_house_the_kernels_alone() -> None:
    for name, path in SOURCES.items():
        if is_under(name, ("streamtrain.objective",)):
            foreign = [
                i for i in imports(path)
                if is_under(i, OURS) and not is_under(i, ("streamtrain.objective", "streamtrain.kernels"))
            ]  # fmt: skip
            assert not foreign, f"{name} imports {foreign}"


def test_the_lower_floors_load_without_torch() -> None:
    """In a fresh interpreter, since an import of an import counts too."""
    names = [name for name in SOURCES if is_under(name, TORCH_FREE)]
    code = f"import {', '.join(names)}, sys; assert not {{'torch', 'deepspeed'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_command_line_loads_torch_before_it_is_parsed() -> None:
    """``--help`` and a mistyped argument are answered at once."""
    names = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))
    scripts = [name for name in names if "argparse.ArgumentParser(" in (ROOT / "tools" / f"{name}.py").read_text()]
    assert "evaluate" in scripts
    code = f"import {', '.join(scripts)}, streamtrain.main, sys; assert not {{'torch', 'deepspeed'}} & set(sys.modules)"
    paths = os.pathsep.join(map(str, (ROOT / "tools", ROOT)))
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_package_init_files_are_empty() -> None:
    assert [
        name for name, path in SOURCES.items() if path.name == "__init__.py" and path.read_text().strip()
    ] == []


def test_every_room_has_a_name_of_its_own() -> None:
    assert not [
        n for n in SOURCES if n.split(".")[-1] in {"util", "utils", "helper", "helpers", "common", "misc"}
    ]


def test_no_module_beside_main_hides_a_library() -> None:
    """`deepspeed streamtrain/main.py` puts streamtrain/ first on sys.path."""
    libraries = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions()) - set(OURS)
    beside_main = {p.stem for p in (ROOT / "streamtrain").iterdir() if p.suffix == ".py" or p.is_dir()}
    assert not (beside_main - {"__init__", "__pycache__"}) & libraries


def test_no_file_has_grown_too_large() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in SOURCES.items()}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_path_of_one_machine() -> None:
    machine = re.compile(rf"(?<![\w.])/(home|Users|root|mnt)/\w|{re.escape(str(ROOT))}/")
    texts = [p for s in ("py", "sh", "md", "yaml", "ini", "toml", "cff") for p in ROOT.glob(f"*.{s}")]
    for folder in (*OURS, "configs", "tests", "docs"):
        texts += [p for s in ("py", "sh", "md", "yaml") for p in (ROOT / folder).rglob(f"*.{s}")]
    assert not [str(path) for path in texts if machine.search(path.read_text(encoding="utf-8"))]
