"""Code of a user that a setting names: found in the working directory, or refused in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from streamtrain.config.data import DataConfig
from streamtrain.config.user_code import describe_failure, load_user_code
from streamtrain.errors import UserCodeError

ARGUMENTS = ("crops", "generator")


def load(reference: str) -> object:
    return load_user_code("data.augmentations", reference, ARGUMENTS)


@pytest.mark.parametrize(
    "text", ["my_code", "my_code.py:f", "folder/my_code:f", ":f", "my_code:", "a:b:c", "a:b.c", ""]
)
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="must be MODULE:NAME, such as my_code:my_name"):
        DataConfig(augmentations=text)


def test_a_module_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "found_by_folder"
    package.mkdir()
    (tmp_path / "found_beside.py").write_text("VALUE = 3\n")
    (package / "inner.py").write_text("import found_beside\ndef f(*inputs): return found_beside.VALUE\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    function = load("found_by_folder.inner:f")
    assert callable(function) and function() == 3
    # installed modules precede a file of the same name
    (tmp_path / "zipapp.py").write_text("raise AssertionError\n")
    with pytest.raises(UserCodeError, match=r"zipapp .*python3.*zipapp.py\) has no f"):
        load("zipapp:f")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nowhere_to_be_found:f", "there is no module nowhere_to_be_found; start in the folder of nowhere"),
        ("own_code.inner:f", "there is no module own_code.inner"),
        ("own_code:inverd", "has no inverd; did you mean invert?"),
        ("own_code:NUMBER", "NUMBER in .*own_code.py is a int, not a function or a class"),
        ("own_code:takes_no_generator", r"is called with \(crops, generator\), but too many .*own_code.py, line 59\)"),
        ("broken_syntax:f", r"importing broken_syntax failed: SyntaxError: .*broken_syntax.py, line 2\)"),
        ("broken_import:f", r"ModuleNotFoundError: No module named 'not_there' \(.*broken_import.py, line 2\)"),
        ("broken_exit:f", r"importing broken_exit failed: SystemExit: 3 \(.*broken_exit.py, line 3\)"),
    ],
)
def test_errors(reference: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_syntax.py").write_text("\ndef f(:\n")
    (tmp_path / "broken_import.py").write_text("\nimport not_there\n")
    (tmp_path / "broken_exit.py").write_text("import sys\n\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserCodeError, match=f"^data.augmentations={reference}: .*{message}") as error:
        load(reference)
    assert "\n" not in str(error.value)


def test_the_line_is_the_last_one_of_the_users_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "uses_json.py").write_text("import json\n\ndef f(*inputs):\n    return json.loads('[')\n")
    monkeypatch.syspath_prepend(tmp_path)
    function = load("uses_json:f")
    assert callable(function)
    try:
        function()
    except ValueError as error:
        assert describe_failure(error, function).endswith("uses_json.py, line 4)")
