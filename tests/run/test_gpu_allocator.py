"""torch's allocator of GPU memory gets its defaults before torch is imported, and the user's settings are kept."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from commands import ENVIRONMENT

from streamtrain.run import gpu_allocator
from streamtrain.run.gpu_allocator import DEFAULT, VARIABLES, set_allocator_defaults

# the function that all launchers call in each rank, and the command line
RANK = """
from streamtrain import main
main.train_rank = lambda arguments: report()
main.run_process(None)
"""
COMMAND = """
from streamtrain.cli import main, plan
plan.run = lambda arguments: report()
sys.argv = ["streamtrain", "plan", "--config", "vits16.yaml"]
sys.exit(main.main())
"""
REPORT = """
import os, sys
from streamtrain.run import gpu_allocator
gpu_allocator.has_gpu_driver = lambda: True
def report():
    print("torch" in sys.modules, os.environ["PYTORCH_ALLOC_CONF"])
    return 0
"""


@pytest.mark.parametrize("code", [RANK, COMMAND], ids=["rank", "command"])
def test_the_default_is_set_before_torch_is_imported(code: str) -> None:
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", REPORT + code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"False {DEFAULT}\n"), done.stderr


@pytest.mark.parametrize("name", VARIABLES)
def test_a_setting_of_the_user_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in VARIABLES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setattr(gpu_allocator, "has_gpu_driver", lambda: True)
    monkeypatch.setenv(name, "max_split_size_mb:512")
    set_allocator_defaults()
    assert {key: value for key, value in os.environ.items() if key in VARIABLES} == {name: "max_split_size_mb:512"}


def test_without_a_gpu_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpu_allocator, "has_gpu_driver", lambda: False)
    set_allocator_defaults()
    assert not any(name in os.environ for name in VARIABLES)
