"""Settings of every test: the CPU features, one thread per process, no time limit for a hypothesis example."""

from __future__ import annotations

import argparse
import os
import shlex
import sys

import pytest
from hypothesis import settings

from streamtrain.ops.cpu.features import cpu_features

# Variables that make torch, oneDNN and streamtrain behave as on such a CPU, and the feature this CPU must have.
CPUS = {
    "native": ({}, None),
    "avx2": ({"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, "avx2"),
    "avx512": ({"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "avx512"),
}


def select_cpu() -> None:
    """Set the variables of ``--cpu`` before anything imports torch; processes started by tests inherit them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--cpu", choices=CPUS, default="native")
    words = [*shlex.split(os.environ.get("PYTEST_ADDOPTS", "")), *sys.argv[1:]]
    variables, feature = CPUS[parser.parse_known_args(words)[0].cpu]
    if variables and "torch" in sys.modules:
        raise pytest.UsageError("torch was imported before --cpu could take effect")
    if feature and feature not in cpu_features():
        raise pytest.UsageError(f"--cpu {feature}: this CPU has no {feature}")
    os.environ.update(variables)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu", choices=list(CPUS), default="native", help="run as on a CPU with these features only")


def pytest_report_header() -> str:
    return f"CPU features: {', '.join(sorted(cpu_features())) or 'none'}"


select_cpu()

# Small tensors are faster on one thread, and tests that start ranks would otherwise compete for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("house", deadline=None)
settings.load_profile("house")
