#!/usr/bin/env bash
# Sets up .venv and runs every check: ruff, mypy, pytest.
#
#   tools/test.sh                 everything but what takes minutes or needs a GPU
#   tools/test.sh -k order        arguments go to pytest
#   tools/test.sh -m slow         what takes minutes; -m gpu: what needs a GPU
#
# tools/setup_env.sh tells the variables that the installation heeds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in --help | -h) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' tools/test.sh; exit ;; esac

tools/setup_env.sh test
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
mypy
# two of the tests at a time: those that start ranks spend much of their time on imports
exec python -m pytest -n auto "$@"
