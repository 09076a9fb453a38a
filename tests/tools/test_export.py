"""Exports as users make them, each loaded again by another tool's path."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from tiny_backbone import tiny_weights

from streamtrain.export.load import load_weights

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture()
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_weights(tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(TOOLS))
    return tmp_path


def export(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["export.py", *arguments])
    result: int = importlib.import_module("export").main()
    return result


@pytest.mark.parametrize("kind", ["hf", "timm", "safetensors"])
def test_each_kind_is_written_and_written_again(
    kind: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "hf":
        pytest.importorskip("transformers", reason="transformers is not installed")
    for _ in range(2):
        assert export(monkeypatch, "--weights", "weights", "--to", kind, "--out", "out") == 0
        assert capsys.readouterr().out.startswith("wrote out/model.safetensors (0.0 M parameters")
    assert (place / "out" / "config.json").is_file()
    if kind != "timm":
        load_weights(place / "out")


def test_mistakes_end_in_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "mine").mkdir()
    (place / "mine" / "thesis.txt").write_text("precious")
    (place / "file").write_text("x")
    for source, out, words in (
        (["--weights", "weights"], "mine", "no earlier export"),
        (["--weights", "weights"], "file", "no earlier export"),
        (["--weights", "weights"], "file/below", "cannot write file/below (Not a directory); choose another --out"),
        (["--run", "nowhere"], "out", "not a run folder"),
        ([], "out", "give the network"),
    ):
        assert export(monkeypatch, *source, "--to", "safetensors", "--out", out) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert [path.name for path in (place / "mine").iterdir()] == ["thesis.txt"]
