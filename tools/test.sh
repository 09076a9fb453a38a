#!/usr/bin/env bash
# Sets up .venv and runs every check: ruff, mypy, pytest. Arguments go to pytest: tools/test.sh -k order
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools/setup_env.sh test
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
mypy
# two of the tests at a time: those that start ranks spend much of their time on imports
exec python -m pytest -n auto "$@"
