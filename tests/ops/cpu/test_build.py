"""The kernels' library: compiled once for all processes, and replaced by PyTorch where it cannot be built."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cpu_kernels import needs_kernels
from ranks import ROOT, run_ranks

from streamtrain.ops.cpu import build

# calls of the compiler: one for each source, and one to link
STEPS = len(list(Path(build.__file__).parent.glob("*.cpp"))) + 1
USE = "import torch; from streamtrain.ops.cpu.build import is_enabled; print(is_enabled(torch.float32))"
LOG = "from streamtrain.run.logs import configure_logging; configure_logging();"
TRAIN = """
import torch
from streamtrain.config.model import ModelConfig
from streamtrain.model.initialise import initialise
from streamtrain.model.vit import VisionTransformer
config = ModelConfig.model_validate({"dim": 64, "depth": 2, "num_heads": 2, "patch_size": 8})
model = VisionTransformer(config, "block").to(torch.float32)
initialise(model, config, 0)
model([torch.randn(2, 3, 16, 16)], generator=torch.Generator())[0].cls.square().sum().backward()
print(all(p.grad.isfinite().all() for n, p in model.named_parameters() if "mask" not in n))
"""


def started(code: str, cache: Path, compiler: Path | str, **variables: str) -> subprocess.Popen[str]:
    variables |= {"TORCH_EXTENSIONS_DIR": str(cache), "CXX": str(compiler), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip(), err


def compiler(folder: Path, work: str) -> Path:
    """Return a program that appends its process id to the file ``calls``, then does ``work``."""
    script = folder / "compiler"
    script.write_text(f"#!/bin/sh\necho $$ >> {shlex.quote(str(folder / 'calls'))}\n{work}\n")
    script.chmod(0o755)
    return script


def calls(folder: Path) -> list[int]:
    log = folder / "calls"
    return [int(line) for line in log.read_text().splitlines()] if log.exists() else []


def copying() -> str:
    """Return the work of a compiler with a cache: after a second, copy the finished library to the output."""
    build.load(torch.float32)
    with build._open_cache() as folder:
        library = shlex.quote(f"{os.readlink(f'/proc/self/fd/{folder}')}/{build.library_name()}")
    return f'sleep 1\nwhile [ "$1" != -o ]; do shift; done\ncp {library} "$2"'


@needs_kernels
def test_ranks_that_start_together_compile_once(tmp_path: Path) -> None:
    program = compiler(tmp_path, copying())
    both = [started(USE, tmp_path / "cache", program) for _ in range(2)]
    assert [finished(process)[0] for process in both] == ["True", "True"]
    assert len(calls(tmp_path)) == STEPS


@needs_kernels
def test_a_process_killed_while_compiling_does_not_block_others(tmp_path: Path) -> None:
    killed = started(USE, tmp_path / "cache", compiler(tmp_path, "exec sleep 60"))
    deadline = time.monotonic() + 60
    while len(calls(tmp_path)) < min(STEPS - 1, os.cpu_count() or 1):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    waiting = started(USE, tmp_path / "cache", compiler(tmp_path, copying()))
    killed.kill()
    killed.wait()
    left = calls(tmp_path)
    for call in left:
        os.kill(call, signal.SIGKILL)
    assert finished(waiting)[0] == "True"
    assert len(calls(tmp_path)) == len(left) + STEPS


def no_compiler(folder: Path) -> tuple[Path, str]:
    return folder / "cache", "/nonexistent"


def failing_compiler(folder: Path) -> tuple[Path, str]:
    return folder / "cache", str(compiler(folder, "echo 'no such instruction' >&2\nexit 1"))


def broken_library(folder: Path) -> tuple[Path, str]:
    return folder / "cache", str(compiler(folder, 'while [ "$1" != -o ]; do shift; done\necho nothing > "$2"'))


def no_folder(folder: Path) -> tuple[Path, str]:
    (folder / "file").touch()
    return folder / "file" / "cache", "c++"


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float32, {"ONEDNN_MAX_CPU_ISA": "AVX2"}), (torch.bfloat16, {"ATEN_CPU_CAPABILITY": "avx2"}),
     pytest.param(torch.float32, {"ATEN_CPU_CAPABILITY": "avx2"}, marks=pytest.mark.slow),
     pytest.param(torch.bfloat16, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, marks=pytest.mark.slow)],
)  # fmt: skip
def test_training_limited_to_avx2_uses_no_kernels(dtype: torch.dtype, limit: dict[str, str], tmp_path: Path) -> None:
    out, err = finished(started(TRAIN.replace("torch.float32", str(dtype)), tmp_path, "/nonexistent", **limit))
    assert out == "True" and "kernels" not in err and not list(tmp_path.iterdir())


@needs_kernels
@pytest.mark.parametrize(
    ("trouble", "reason"),
    [(no_compiler, "/nonexistent"), (failing_compiler, "no such instruction"),
     (broken_library, "the compiled library cannot be loaded"), (no_folder, "Not a directory")],
)  # fmt: skip
def test_without_a_library_training_warns_once_and_uses_pytorch(
    trouble: Callable[[Path], tuple[Path, str]], reason: str, tmp_path: Path
) -> None:
    out, err = finished(started(TRAIN, *trouble(tmp_path)))
    assert out == "True"
    assert err.count("the CPU kernels cannot be used") == 1 and "g++" in err and reason in err


@needs_kernels
def test_no_rank_uses_kernels_unless_all_can(tmp_path: Path) -> None:
    """Sinkhorn's collectives differ with the kernels."""
    results = run_ranks([Path(__file__).with_name("unequal_ranks.py"), tmp_path, "true"], 2)
    printed = [(status, out.split()[-2:]) for status, out, _ in results]
    assert printed == [(0, ["True", "False"]), (0, ["False", "False"])]
    assert "the CPU kernels cannot be used" in results[1][2]


@needs_kernels
def test_the_setting_selects_the_kernels(tmp_path: Path) -> None:
    for key, used in (("true", "True"), ("false", "False")):
        ((status, out, _),) = run_ranks([Path(__file__).with_name("unequal_ranks.py"), tmp_path, key], 1)
        assert (status, out.split()[-2:]) == (0, ["True", used])


def test_a_cpu_without_the_instructions_neither_compiles_nor_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build, "cpu_features", lambda: frozenset({"avx2"}))
    assert not any(build.load.__wrapped__(dtype) for dtype in (torch.float32, torch.bfloat16))
    assert not list(tmp_path.iterdir()) and not caplog.records


@needs_kernels
@pytest.mark.slow
def test_the_compiler_of_this_machine_builds_the_library(tmp_path: Path) -> None:
    both = [started(LOG + USE, tmp_path, os.environ.get("CXX", "c++")) for _ in range(2)]
    (one, errors), (other, other_errors) = (finished(process) for process in both)
    assert sorted((one + "\n" + other).splitlines()) == [
        "True", "True", "compiling the CPU kernels: once per machine, usually half a minute"
    ]  # fmt: skip
    assert not errors and not other_errors
    assert len(list(tmp_path.rglob("*.so"))) == 1
