"""The commands and Python blocks of each page run, in their order, at toy size."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from doc_blocks import BLOCKS, Block
from doc_world import build, run_shell

# the examples of the help, which are parsed only: they name many files and buckets
PARSED_ONLY = "docs/cli.md"
RUNNING = [b for b in BLOCKS if b.language in ("bash", "python") and not b.not_run and b.page != PARSED_ONLY]
PAGES = sorted({block.page for block in RUNNING})

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("docs") / "template")


def at_toy_size(text: str) -> str:
    """Shorten the runs, and start one rank on a machine without GPUs."""
    text = re.sub(r"""run\.steps=("[^"]*"|\S+)""", "run.steps=4", text)
    text = re.sub(r"\bsteps=[\d_]+", "steps=4", text)
    text = re.sub(r"(streamtrain train.*?--gpus) \d+", r"\1 1", text)
    return re.sub(r"--(nproc_per_node|num_gpus) \d+", r"--\1 1", text)


def remove_outputs(text: str, folder: Path) -> None:
    """Remove the outputs of the block, except a run that it resumes."""
    names = re.findall(r"--out (\S+)|run\.dir=(\S+)", text)
    if "--accept" not in text:
        for name in {first or second for first, second in names}:
            shutil.rmtree(folder / name, ignore_errors=True)


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page: str, template: Path, tmp_path: Path) -> None:
    folder = tmp_path / "world"
    shutil.copytree(template, folder, symlinks=True)
    for block in (block for block in RUNNING if block.page == page):
        run_block(block, folder)


def run_block(block: Block, folder: Path) -> None:
    text = at_toy_size(block.text)
    remove_outputs(text, folder)
    if block.language == "bash":
        run_shell(text, folder)
    elif block.saved_as is not None:
        (folder / block.saved_as).write_text(text)
    else:
        (folder / "block.py").write_text(text)
        run_shell("python block.py", folder)
