"""The README names what there is, and nothing that there is not."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamtrain.config.load import load_config
from streamtrain.config.model import PRESETS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> Iterator[tuple[str, list[str]]]:
    """Script and arguments of every command line in the README's blocks."""
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            script = next((index for index, word in enumerate(words) if word.endswith((".py", ".sh"))), None)
            if script is not None:
                yield words[script], words[script + 1 :]


def test_every_recipe_preset_and_tool_is_named() -> None:
    names = {f"`{path.name}`" for path in (ROOT / "configs").glob("*.yaml")} | {f"`{name}`" for name in PRESETS}
    for path in (ROOT / "tools").iterdir():
        if path.suffix in (".py", ".sh") and ("ArgumentParser(" in path.read_text() or path.suffix == ".sh"):
            names.add(path.name)
    # those that others start
    names -= {"setup_env.sh", "make_demo_images.py"}
    assert not {name for name in names if name not in README}


@pytest.mark.parametrize("script", sorted({script for script, _ in commands() if script.endswith(".py")}))
def test_every_option_of_a_command_line_exists(script: str) -> None:
    kinds = {arguments[0] for name, arguments in commands() if name == script and not arguments[0].startswith("-")}
    kinds = kinds if script in ("tools/bench.py", "tools/visualize.py") else set()
    texts = [
        subprocess.run([sys.executable, script, *kind, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
        for kind in ([], *([kind] for kind in sorted(kinds)))
    ]
    known = set(re.findall(r"--[a-z][a-z-]*", " ".join(texts)))
    used = {word for name, arguments in commands() if name == script for word in arguments if word.startswith("--")}
    assert used <= known, used - known


def test_every_setting_of_a_command_line_is_valid() -> None:
    checked = 0
    for script, arguments in commands():
        if script == "streamtrain/main.py":
            overrides = [word for word in arguments if "=" in word]
            load_config(arguments[arguments.index("--config") + 1], overrides)
            checked += 1
    assert checked > 5
    for key in re.findall(r"`((?:data|crops|masks|model|objective|teacher|optim|engine|init|run)\.[a-z_.]+)`", README):
        found = load_config("quickstart.yaml").model_dump()
        for part in key.split("."):
            assert part in found, key
            found = found[part]
