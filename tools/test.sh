#!/usr/bin/env bash
# Set up .venv and run every check: ruff (lint and format), mypy, import-linter, pytest.
#
#   tools/test.sh                 all tests except slow ones and those for a GPU or a cluster
#   tools/test.sh -k order        arguments are passed to pytest
#   tools/test.sh -m slow         the tests that take minutes; -m gpu: the tests that need a GPU
#   tools/test.sh -m cluster      two machines as network namespaces; needs root
#
# tools/setup_env.sh --help lists the variables of the installation.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in --help | -h) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' tools/test.sh; exit ;; esac

tools/setup_env.sh test
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .
mypy
lint-imports --no-cache
# in parallel, because the tests that start ranks spend much of their time on imports
exec python -m pytest -n auto "$@"
