"""Every command, Python call and YAML file in the documentation is valid, and runs at toy size (slow)."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from doc_blocks import BLOCKS, ROOT, WRAPPERS, Block, command_lines

import streamtrain
from streamtrain.cli.main import parse_arguments
from streamtrain.config.load import load_config
from streamtrain.main import add_arguments

# programs of others
PROGRAMS = {
    "cat", "pip", "printf", "tensorboard", "source", "mkdocs", "hf", "sbatch", "for", "case", "sleep", "done",
    ".venv/bin/python",
}  # fmt: skip
REASONS = (
    "needs a GPU",
    "needs GPUs",
    "needs an account",
    "takes hours",
    "runs all tests",
    "changes the checkout",
    "tests/",
)
SHELL = [block for block in BLOCKS if block.language == "bash"]
COMMANDS = [(block, words) for block in SHELL for words in command_lines(block.text)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
YAML = [block for block in BLOCKS if block.language == "yaml"]


def ours(words: list[str]) -> tuple[str, list[str]] | None:
    """Return our program in a command line, and its arguments; None for other programs."""
    for index, word in enumerate(words):
        if word == "streamtrain" or (word.endswith((".py", ".sh")) and (ROOT / word).is_file()):
            return word, words[index + 1 :]
    return None


def parse(program: str, arguments: list[str]) -> argparse.Namespace | None:
    """Parse a command line of our own parsers; None for other scripts."""
    if program == "streamtrain/main.py":
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        return parser.parse_intermixed_args(arguments)
    if program == "streamtrain" or program in WRAPPERS:
        return parse_arguments(arguments if program == "streamtrain" else [WRAPPERS[program], *arguments])
    return None


@pytest.mark.parametrize(("block", "words"), COMMANDS, ids=lambda value: str(value) if isinstance(value, Block) else "")
def test_commands_have_known_options_and_valid_settings(block: Block, words: list[str]) -> None:
    found = ours(words)
    if found is None:
        assert words[0] in PROGRAMS or "=" in words[0], words
        return
    program, arguments = found
    if "--help" in arguments:
        arguments = arguments[:1]
    parsed = parse(program, arguments)
    if parsed is not None:
        config = getattr(parsed, "config", None)
        if getattr(parsed, "overrides", None) is not None and config and config != "my.yaml":
            # these need the set itself
            load_config(
                config, [word for word in parsed.overrides if not re.search(r"from_set$|epochs$|^init.channels=", word)]
            )
        return
    used = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    assert used <= known_options(program, arguments[0] if arguments else "")


@cache
def known_options(program: str, kind: str) -> set[str]:
    """Return the options that a script lists in its help; of tools/bench.py, in the help of the subcommand ``kind``."""
    command = ["bash" if program.endswith(".sh") else sys.executable, program]
    command += [kind] if program == "tools/bench.py" else []
    text = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    # tools/test.sh passes its options to pytest
    text += (ROOT / "tests" / "conftest.py").read_text() if program == "tools/test.sh" else ""
    return set(re.findall(r"--[a-z][a-z-]*", text))


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_calls_of_the_api_fit_their_signatures(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("streamtrain."):
            name = ast.unparse(node.func).removeprefix("streamtrain.")
            assert name in streamtrain.__all__
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(getattr(streamtrain, name)).bind(*node.args, **keywords)


@pytest.mark.parametrize("block", YAML, ids=str)
def test_yaml_is_a_valid_recipe(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(block.text, encoding="utf-8")
    load_config(str(path), [])


def test_blocks_that_do_not_run_have_a_reason() -> None:
    for block in BLOCKS:
        assert block.language in ("bash", "python", "yaml", "json", "text"), f"{block} has no language"
        if block.language == "json":
            json.loads(block.text)
        if block.not_run is not None:
            assert block.not_run.startswith(REASONS), f"{block}: {block.not_run}"
            if block.not_run.startswith("tests/"):
                assert (ROOT / block.not_run.split()[0]).is_file(), f"{block}: {block.not_run}"
