"""The terminal shows one safe line for each message; tracebacks are in a file."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import ROOT

from streamtrain.run.logs import configure_logging, keep_tracebacks

CODE = """
import logging, sys
from pathlib import Path
from streamtrain.run.logs import configure_logging, keep_tracebacks
configure_logging()
keep_tracebacks(Path(sys.argv[1]))
logger = logging.getLogger("streamtrain.x")
logger.warning("one %s\\ntwo", "caf\\udce9 \\x1b[31m\\u4e2d")
try:
    raise ValueError("bad \\x1b name")
except ValueError as error:
    logger.warning("the probe failed", exc_info=error)
print("\\udce9")
"""


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_messages_are_escaped_and_tracebacks_are_kept(tmp_path: Path, locale: str) -> None:
    log = tmp_path / "tracebacks.log"
    environment = {"LC_ALL": locale, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", CODE, log], env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    shown = b"\\u4e2d" if locale == "C" else "\u4e2d".encode()
    first, second, third = done.stderr.splitlines()
    assert first == b"warning: one caf\\udce9 \\x1b[31m" + shown and second == b"two"
    assert third == f"warning: the probe failed: ValueError: bad \\x1b name (traceback in {log})".encode()
    assert "warning: the probe failed\nTraceback (most recent call last)" in log.read_text()


def test_without_a_file_the_traceback_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("streamtrain")
    kept = (logger.handlers, logger.level, logger.propagate)
    try:
        configure_logging()
        for path, text in (
            (None, "Traceback"),
            (tmp_path / "no folder" / "log", "Traceback"),
            (tmp_path / "log", ": "),
        ):
            if path is not None:
                keep_tracebacks(path)
            logger.warning("failed with %s", path, exc_info=ValueError("reason"))
            shown = capsys.readouterr().err
            assert ("ValueError: reason" in shown) and (text in shown or "Traceback" not in shown)
        # a disk error says enough by itself
        keep_tracebacks(tmp_path / "no folder" / "log")
        logger.warning("failed", exc_info=OSError(28, "No space left on device"))
        assert capsys.readouterr().err == "warning: failed: OSError: [Errno 28] No space left on device\n"
        # a message that cannot be formatted
        logger.warning("%d", "text")
    finally:
        logger.handlers, logger.level, logger.propagate = kept


LIBRARIES = """
import logging, sys, warnings
from pathlib import Path
from streamtrain.run import logs
logs.hide_library_messages()
logs.configure_logging(int(sys.argv[2]), 2)
logs.keep_messages(Path(sys.argv[1]), int(sys.argv[2]), 2)
own = logging.getLogger("DeepSpeed")
own.propagate = False
own.addHandler(logging.StreamHandler(sys.stdout))
logs.take_over(own)
for logger in (own, logging.getLogger("torchao"), logging.getLogger()):
    for _ in range(3):
        logger.warning("chatter of %s", logger.name)
    logger.info("more chatter")
warnings.warn("old name", FutureWarning)
logging.getLogger("streamtrain.x").info("hello")
for _ in range(3):
    logging.getLogger("streamtrain.x").warning("twice")
try:
    raise ValueError("the reason")
except ValueError:
    own.exception("cannot \\x1b go on")
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_messages_of_libraries_are_only_in_the_file_unless_they_are_errors(rank: int, tmp_path: Path) -> None:
    log = tmp_path / "messages.log"
    environment = {"LC_ALL": "C.UTF-8", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", LIBRARIES, log, str(rank)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    prefix = "[rank 1] " if rank else ""
    assert done.stdout == ("" if rank else "hello\n")
    first, second, *trace = done.stderr.splitlines()
    assert first == f"{prefix}warning: twice" and second == f"{prefix}error: cannot \\x1b go on (DeepSpeed)"
    assert trace[0].startswith("Traceback") and trace[-1] == "ValueError: the reason"
    text = log.read_text()
    for line in ("chatter of DeepSpeed (DeepSpeed)", "chatter of torchao (torchao)", "chatter of root (root)"):
        pattern = rf"^\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d {re.escape(f'{prefix}warning: {line}')}$"
        assert len(re.findall(pattern, text, re.MULTILINE)) == 1
    assert "FutureWarning: old name" in text and "ValueError: the reason" in text and "more chatter" not in text
    assert ("hello" in text) == (rank == 0) and text.count("twice") == 3

    shown = subprocess.run(
        words, env={**environment, "PYTHONWARNINGS": "default"}, capture_output=True, text=True, timeout=60
    )
    assert "chatter of DeepSpeed" in shown.stdout and "FutureWarning: old name" in shown.stderr


def test_messages_are_shown_without_the_file(tmp_path: Path) -> None:
    """As on a full or read-only disk."""
    words = [sys.executable, "-c", LIBRARIES, tmp_path / "no folder" / "log", "0"]
    done = subprocess.run(words, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert done.stdout == "hello\n" and done.stderr.startswith("warning: twice\nerror: cannot")


PRINTING = """
import sys, types
import torch
torch.version.cuda = "13.0"
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(major=9, minor=0)
import torch.utils.cpp_extension
torch.utils.cpp_extension.CUDA_HOME = None
from pathlib import Path
from streamtrain.engine.runtime import BUILDER_WARNING
from streamtrain.run.logs import hide_library_messages, keep_messages, log_printed_lines
if sys.argv[2] == "hide":
    hide_library_messages()
keep_messages(Path(sys.argv[1]), 0, 1)
with log_printed_lines(BUILDER_WARNING, "deepspeed"):
    import deepspeed
    from streamtrain.engine import deepspeed_compat
    deepspeed_compat.check_version()
    print("another line")
    print("the rest", end="")
"""


@pytest.mark.parametrize("mode", ["hide", pytest.param("show", marks=pytest.mark.slow)])
def test_lines_of_builders_without_nvcc_are_kept_in_the_log(tmp_path: Path, mode: str) -> None:
    """As on a GPU without nvcc, as far as DeepSpeed can be imported on a CPU."""
    log = tmp_path / "messages.log"
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cuda"}
    done = subprocess.run(
        [sys.executable, "-c", PRINTING, log, mode], env=variables, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert (lines[-1], last) == ("another line", "the rest")
    if mode == "hide":
        assert len(lines) == 1
        kept = [line for line in log.read_text().splitlines() if "treating the op as not compatible" in line]
        assert len(kept) == 7 and all("warning: " in line and line.endswith("(deepspeed)") for line in kept)
    else:
        assert len(lines) == 8 and "treating the op as not compatible" in lines[0]
