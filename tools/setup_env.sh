#!/usr/bin/env bash
# Create .venv in the checkout and install streamtrain into it; does nothing if that is already done.
#
#   tools/setup_env.sh [EXTRA ...]      EXTRA: hf (export for transformers), 8bit (8-bit Adam moments), eval (logistic
#                                       regression), onnx, http, s3, gcs (remote shards), parquet, wandb, mlflow, docs,
#                                       test.
#                                       The extra for DALI is chosen from the GPU driver. With test, the versions of
#                                       requirements/test.lock are installed if Python's version matches.
#
# Variables:
#   PYTHON                  interpreter to use (default: the first of python3, python3.13 ... that is >= 3.10)
#   STREAMTRAIN_TORCH_INDEX source of torch for pip: the address of a package index, or a local folder with a wheel,
#                           such as a CPU build or one for another CUDA version (default: pip's configuration)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in --help | -h) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' tools/setup_env.sh; exit ;; esac

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python >= 3.10 found; install one, or set PYTHON=/path/to/python3"
}

# The DALI build for the installed driver: nvidia-smi prints the newest CUDA version that the driver supports.
dali_extra() {
    local major
    major=$(nvidia-smi 2>/dev/null | grep -oE 'CUDA[A-Z ]*Version: *[0-9]+' | grep -oE '[0-9]+$' | head -n 1 || true)
    if [ -n "$major" ] && [ "$major" -lt 13 ]; then echo cu12; else echo cu13; fi
}

make_venv() {
    local python
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python has no venv module; on Debian and Ubuntu: apt-get install python3-venv"
    printf 'Creating .venv with %s (%s)\n' "$("$python" --version)" "$python"
    "$python" -m venv --clear .venv
    .venv/bin/python -m pip install -qq --disable-pip-version-check --upgrade pip
}

# Write pip's output to the log, and its current action to the terminal.
pip_install() {
    local log=.venv/install.log
    if ! .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off "$@" 2>&1 |
        tee "$log" | show_progress; then
        grep -iE '^ *error' "$log" | tail -n 5 >&2 || true
        fail "the installation failed; the full output is in $PWD/$log"
    fi
}

show_progress() {
    local line
    while IFS= read -r line; do
        case "$line" in
            Collecting* | *Downloading* | *Building* | Installing\ collected*) ;;
            *) continue ;;
        esac
        line=${line#"${line%%[![:space:]]*}"}
        if [ -t 1 ]; then
            printf '\r\033[K  %s' "${line:0:76}"
        else
            case "$line" in *started | *\ [MG]B\)* | Installing*) printf '  %s\n' "${line:0:110}" ;; esac
        fi
    done
    if [ -t 1 ]; then printf '\r\033[K'; fi
}

# The option that pins the tested versions, if requirements/test.lock was made with this version of Python.
constraint() {
    local lock=requirements/test.lock
    case " $* " in *' test '*) ;; *) return ;; esac
    if .venv/bin/python -c 'import sys; print("# Python %d.%d" % sys.version_info[:2])' | grep -qxFf - "$lock"; then
        printf -- '--constraint %s' "$lock"
    fi
}

install() {
    local torch extras
    extras=$(IFS=,; echo "$*")
    printf 'Installing streamtrain[%s] into .venv (minutes the first time)\n' "$extras"
    if [ -n "${STREAMTRAIN_TORCH_INDEX:-}" ]; then
        torch=$(grep -oE 'torch>=[^"]+' pyproject.toml | head -n 1)
        if [ -d "$STREAMTRAIN_TORCH_INDEX" ]; then
            pip_install --no-deps --no-index --find-links "$STREAMTRAIN_TORCH_INDEX" "$torch"
        else
            pip_install --no-deps --index-url "$STREAMTRAIN_TORCH_INDEX" "$torch"
        fi
    fi
    # shellcheck disable=SC2046  # two words or none
    pip_install $(constraint "$@") --editable ".[$extras]"
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
        .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || printf '%s\n' \
            "warning: the installed PyTorch cannot use this machine's GPU driver, so everything runs on the CPU;" \
            "         set STREAMTRAIN_TORCH_INDEX to a build for your CUDA version (see pytorch.org)" >&2
    fi
}

# One stamp per extra, so that an installation with more extras also serves a call with fewer.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then make_venv; fi
extras=("$(dali_extra)" "$@")
stamp=$( (cat pyproject.toml requirements/*.lock; .venv/bin/python --version; echo "${STREAMTRAIN_TORCH_INDEX:-}") | sha256sum)
for extra in "${extras[@]}"; do
    if [ "$(cat ".venv/installed-$extra" 2>/dev/null)" != "$stamp" ]; then
        install "${extras[@]}"
        for extra in "${extras[@]}"; do printf '%s\n' "$stamp" >".venv/installed-$extra"; done
        break
    fi
done
if [ -t 1 ]; then printf '.venv is ready; use it with: source .venv/bin/activate\n'; fi
