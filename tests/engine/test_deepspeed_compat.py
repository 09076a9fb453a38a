"""Supported DeepSpeed versions work; other versions are a one-line error at start."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from ranks import ROOT, run_ranks

from streamtrain.engine import deepspeed_compat
from streamtrain.errors import ConfigError

STEPS = Path(__file__).with_name("sharded_step.py")
OLDEST, NEWEST = "==0.19.0", deepspeed_compat.SUPPORTED


def test_unknown_version_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed_compat.check_version()
    monkeypatch.setattr(deepspeed, "__version__", "0.20.1")
    with pytest.raises(ConfigError) as caught:
        deepspeed_compat.check_version()
    assert str(caught.value) == (
        "DeepSpeed 0.20.1 is not supported: streamtrain is not tested with this version; install deepspeed>=0.19,<0.20"
    )


def test_missing_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stage3 = SimpleNamespace(**dict.fromkeys(deepspeed_compat._STAGE3_NAMES))
    coordinator = SimpleNamespace(_PartitionedParameterCoordinator__ongoing_fetch_events=None)
    stage3.parameter_offload = SimpleNamespace(get_param_coordinator=lambda: coordinator)
    deepspeed_compat.Stage3Optimizer(stage3)
    del stage3.grad_position
    with pytest.raises(ConfigError, match=r"stage3\.grad_position is missing; install deepspeed>=0\.19,<0\.20$"):
        deepspeed_compat.Stage3Optimizer(stage3)
    with pytest.raises(ConfigError, match=r"parameter\.ds_shape is missing"):
        deepspeed_compat.check_parameter(torch.nn.Parameter(torch.zeros(1)))
    monkeypatch.delattr(deepspeed.utils.groups, "_clone_world_group")
    with pytest.raises(ConfigError, match=r"utils\.groups\._clone_world_group is missing"):
        deepspeed_compat.check_version()


def test_no_other_module_uses_private_names() -> None:
    modules = ("__compatible_ops__", "_clone_world_group", "partition_all_parameters")
    names = (*deepspeed_compat._STAGE3_NAMES, *deepspeed_compat._PARAMETER_NAMES, *modules)
    uses = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    found = {path.name for path in (ROOT / "streamtrain").rglob("*.py") if uses.search(path.read_text())}
    assert found == {"deepspeed_compat.py"}


def test_supported_versions_are_those_that_pip_installs() -> None:
    assert f'"deepspeed{deepspeed_compat.SUPPORTED}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("version", [OLDEST, NEWEST], ids=["oldest", "newest"])
def test_oldest_and_newest_supported_version_train(version: str, tmp_path: Path) -> None:
    """Two ranks equal plain arithmetic with that version, which needs every private name."""
    words = ("install", "--no-deps", "--no-build-isolation", "--retries", "1", "--target", str(tmp_path / "packages"))
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, f"deepspeed{version}"], capture_output=True, text=True,
        env={**os.environ, "DS_BUILD_OPS": "0"},
    )  # fmt: skip
    if done.returncode and "No matching distribution" in done.stderr:
        pytest.skip(f"no package index with deepspeed{version} can be reached")
    assert done.returncode == 0, done.stderr[-2000:]
    check = "import deepspeed, sys; sys.stdout.write(deepspeed.__file__)"
    ((code, path, errors),) = run_ranks(["-c", check], 1, packages=tmp_path / "packages")
    assert code == 0 and path.endswith(str(tmp_path / "packages" / "deepspeed" / "__init__.py")), errors[-2000:]
    results = run_ranks([STEPS, "fp32", "none", "1"], 2, packages=tmp_path / "packages")
    assert [code for code, _, _ in results] == [0, 0], results[0][2][-2000:] + results[1][2][-2000:]
    report = json.loads(results[0][1].splitlines()[-1])
    assert report["gradient"] < 1e-4 and report["moment"] < 1e-4 and report["ema"] < 1e-6 and report["moved"] > 1e-4
