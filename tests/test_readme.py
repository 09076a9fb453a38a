"""The README names every recipe and command, and each of its command lines is valid."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamtrain.cli.main import COMMANDS, parse_arguments
from streamtrain.config.load import load_config
from streamtrain.main import add_arguments
from streamtrain.planning.memory import plan

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# script in tools/ -> the command that it calls
WRAPPERS = {
    f"tools/{path.name}": match[1]
    for path in sorted((ROOT / "tools").glob("*.py"))
    if (match := re.search(r'argv.insert\(1, "(\w+)"', path.read_text()))
}


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Yield the program and the arguments of every command line in the README's blocks."""
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            programs = [i for i, word in enumerate(words) if word == "streamtrain" or word.endswith((".py", ".sh"))]
            if programs:
                yield words[programs[0]], words[programs[0] + 1 :]


def parse_training(program: str, arguments: list[str]) -> argparse.Namespace | None:
    """Parse a command line of our own parsers; None for other scripts."""
    if program == "streamtrain/main.py":
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        return parser.parse_intermixed_args(arguments)
    if program == "streamtrain" or program in WRAPPERS:
        return parse_arguments(arguments if program == "streamtrain" else [WRAPPERS[program], *arguments])
    return None


def test_every_recipe_and_command_is_named() -> None:
    missing = {path.name for path in (ROOT / "configs").glob("*.yaml") if f"`{path.name}`" not in README}
    scripts = {command: script for script, command in WRAPPERS.items()}
    for command in set(COMMANDS) - {"config"}:
        script = Path(scripts.get(command, "streamtrain/main.py")).name
        if f"streamtrain {command}" not in README and script not in README:
            missing.add(command)
    missing |= {script for script in ("tools/quickstart.sh", "tools/test.sh") if script not in README}
    assert not missing


def test_recipes_have_the_planned_numbers_of_parameters() -> None:
    rows = re.findall(r"^\| `(\w+\.yaml)` \| [^|]+ \| ([\d.]+) \|", README, re.MULTILINE)
    assert {name for name, _ in rows} == {path.name for path in (ROOT / "configs").glob("*.yaml")}
    for name, millions in rows:
        count = plan(load_config(name, ["data.shards=x"]), 1).num_backbone_parameters
        assert f"{count / 1e6:.{len(millions.partition('.')[2])}f}" == millions, name


def test_recipes_have_the_accuracies_of_the_result_files() -> None:
    rows = re.findall(r"^\| `(\w+)\.yaml` \|.* \| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    assert [name for name, *_ in rows] == ["quickstart", "photos", "cifar10"]
    files = {"photos": "photos_20000"}
    for name, *accuracies in rows:
        result = (ROOT / "benchmarks" / "results" / f"{files.get(name, name)}.json").read_text(encoding="utf-8")
        assert all(accuracy in result for accuracy in accuracies), name


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_every_script_of_a_command_is_a_command() -> None:
    assert len(WRAPPERS) == 8 and set(WRAPPERS.values()) < set(COMMANDS)


@pytest.mark.parametrize(("program", "arguments"), list(command_lines()), ids=lambda value: str(value)[:60])
def test_command_lines_have_known_options_and_valid_settings(program: str, arguments: list[str]) -> None:
    parsed = parse_training(program, arguments)
    if parsed is not None:
        if getattr(parsed, "overrides", None) is not None and getattr(parsed, "config", None):
            load_config(parsed.config, parsed.overrides)
        return
    assert (ROOT / program).is_file()
    kind = arguments[:1] if program == "tools/bench.py" else []
    command = ["bash" if program.endswith(".sh") else sys.executable, program]
    texts = [
        subprocess.run([*command, *words, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
        for words in ([], kind)
    ]
    known = set(re.findall(r"--[a-z][a-z-]*", " ".join(texts)))
    used = {word for word in arguments if word.startswith("--")}
    assert used <= known, used - known


def test_every_setting_in_the_text_exists() -> None:
    for key in re.findall(r"`((?:data|crops|masks|model|objective|teacher|optim|engine|init|run)\.[a-z_.]+)`", README):
        section = load_config("quickstart.yaml").model_dump()
        for part in key.split("."):
            assert part in section, key
            section = section[part]
