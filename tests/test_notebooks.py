"""The notebooks in ``examples``: their commands exist, and they run from the first to the last cell."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
from ranks import ROOT

from streamtrain.cli.main import parse_arguments

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
MAX_BYTES = 300_000
# settings of the first code cell for a short run
SHORT = {"COUNT": 300, "STEPS": 12, "BASE_STEPS": 12}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read_notebook(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shortened(source: str) -> str:
    """Return the first code cell with the values of ``SHORT``."""
    names, values = source.splitlines()[-1].split(" = ")
    given = dict(zip(names.split(", "), values.split(", "), strict=True))
    assert given.keys() - SHORT.keys() == {"WORK"}
    return f"{names} = {', '.join(str(SHORT.get(name, value)) for name, value in given.items())}"


@each_notebook
def test_notebooks_were_run_from_top_to_bottom_and_are_small(path: Path) -> None:
    assert path.stat().st_size < MAX_BYTES
    notebook = read_notebook(path)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert [output for output in outputs if "image/jpeg" in output.get("data", {})]
    # no path of the machine that ran it
    text = nbformat.writes(notebook)
    assert not re.search(r"(?<![\w.:/])/(home|tmp|root|mnt|usr|work)/", text)


@each_notebook
def test_commands_of_notebooks_are_valid(path: Path) -> None:
    lines = [line for cell in code_cells(read_notebook(path)) for line in cell.source.splitlines()]
    commands = [line[1:].split() for line in lines if line.startswith("!")]
    assert any(words[0] == "streamtrain" for words in commands)
    for words in commands:
        if words[0] == "streamtrain":
            parse_arguments(words[1:])
        else:
            assert words[0] == "python" and (ROOT / "examples" / words[1]).is_file()


@pytest.mark.slow
@each_notebook
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = read_notebook(path)
    first, *others = code_cells(notebook)
    first.source = shortened(first.source)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "examples")}}
    ).execute()
    # a command that fails does not end a notebook
    text = "".join(output.get("text", "") for cell in others for output in cell.outputs)
    assert "error:" not in text and "Traceback" not in text, text
    assert any("image/jpeg" in output.get("data", {}) for cell in others for output in cell.outputs)
