"""Functions and classes of the user's own, which settings name as ``module:name``.

The module is a file in the working directory, or anything that Python can import. Loading it executes it.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from streamtrain.config.section import VALUE_TYPE
from streamtrain.errors import UserCodeError

# of a function of data.augmentations
AUGMENTATION_ARGUMENTS = ("crops", "generator")
_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def check_reference(text: str) -> str:
    """Return ``module:name`` unchanged; raise ValueError for another form."""
    module = text.partition(":")[0]
    if not _REFERENCE.fullmatch(text) or module.endswith(".py"):
        raise ValueError(
            "must be MODULE:NAME, such as my_code:my_name for the file my_code.py in the working directory or in a "
            "folder of PYTHONPATH"
        )
    return text


UserCode = Annotated[str, AfterValidator(check_reference), Field(json_schema_extra={VALUE_TYPE: "module:name"})]


def load_user_code(key: str, reference: str, arguments: Sequence[str]) -> Callable[..., Any]:
    """Import the function or class ``reference``, that setting ``key`` names.

    Args:
        arguments: names of the positional arguments that it will be called with.

    Raises:
        UserCodeError: if it cannot be imported, or cannot be called with these arguments.
    """
    module_name, _, name = reference.partition(":")
    what = f"{key}={reference}"
    _search_working_directory()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise UserCodeError(
                f"{what}: there is no module {error.name}; start in the folder of {error.name}.py, or add that folder "
                "to PYTHONPATH"
            ) from None
        raise UserCodeError(f"{what}: importing {module_name} failed: {describe_failure(error)}") from error
    source = getattr(module, "__file__", None) or "a built-in module"
    found: Any = getattr(module, name, None)
    if found is None:
        close = difflib.get_close_matches(name, vars(module), 1)
        raise UserCodeError(
            f"{what}: {module_name} ({source}) has no {name}" + (f"; did you mean {close[0]}?" if close else "")
        )
    if not callable(found):
        raise UserCodeError(f"{what}: {name} in {source} is a {type(found).__name__}, not a function or a class")
    try:
        inspect.signature(found).bind(*arguments)
    except TypeError as error:
        raise UserCodeError(
            f"{what}: {name} is called with ({', '.join(arguments)}), but {error}{_definition(found)}"
        ) from None
    except ValueError:
        pass  # a function without a signature, such as one written in C
    return found


def code_digest(reference: str) -> str | None:
    """Return 12 hexadecimal digits of the SHA-256 of the file of a module, or None if there is no such file."""
    _search_working_directory()
    try:
        spec = importlib.util.find_spec(reference.partition(":")[0])
        return hashlib.sha256(Path(str(spec and spec.origin)).read_bytes()).hexdigest()[:12]
    except (Exception, SystemExit):
        return None  # a built-in module, or a package that cannot be imported


def describe_failure(error: BaseException, function: object = None) -> str:
    """Return an exception of the user's code with the line that raised it; ``function``: the code that was called."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, SyntaxError):
        return text  # names the file and the line
    installed = tuple(f"{path}{os.sep}" for path in {*sysconfig.get_paths().values(), str(Path(__file__).parents[1])})
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(("<", *installed))
    ]
    return text + (f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else _definition(function))


def _definition(function: object) -> str:
    code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
    return f" ({code.co_filename}, line {code.co_firstlineno})" if code is not None else ""


def _search_working_directory() -> None:
    """Let Python find modules in the working directory too, after all installed ones."""
    try:
        folder = os.getcwd()
    except OSError:
        return  # it has been deleted
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
