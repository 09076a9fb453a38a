"""The terminal shows one safe line for each message; tracebacks are in a file."""

from __future__ import annotations

import logging
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
            logger.warning("failed", exc_info=ValueError("reason"))
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
