#!/usr/bin/env bash
# Makes .venv in the checkout and installs streamtrain into it; does nothing where that is already done.
#
#   tools/setup_env.sh [EXTRA ...]      EXTRA: hf (export for transformers), 8bit (moments in 8 bits), http, s3, gcs
#                                       (shards there), parquet (images in such files), test; the DALI extra is
#                                       chosen by itself
#
# Variables:
#   PYTHON                  the interpreter to use (default: the first of python3, python3.13 ... that is >= 3.10)
#   STREAMTRAIN_TORCH_INDEX where pip takes torch from: the address of a package index, or a local folder with
#                           a wheel, e.g. a CPU build or one for another CUDA version (default: as pip is set up)
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
    fail "no Python >= 3.10 found; install one, or name it: PYTHON=/path/to/python3 $0"
}

# The DALI build for the installed driver. `nvidia-smi` prints the newest CUDA version the driver can run.
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
    printf 'Making .venv with %s (%s)\n' "$("$python" --version)" "$python"
    "$python" -m venv --clear .venv
    .venv/bin/python -m pip install -qq --disable-pip-version-check --upgrade pip
}

# pip's output goes to the log; a line of what it does at present goes to the terminal.
pip_install() {
    local log=.venv/install.log
    if ! .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off "$@" 2>&1 |
        tee "$log" | show_progress; then
        grep -iE '^ *error' "$log" | tail -n 5 >&2 || true
        fail "the installation failed; the whole story is in $PWD/$log"
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

install() {
    local torch extras
    extras=$(IFS=,; echo "$*")
    printf 'Installing streamtrain[%s] into .venv (minutes the first time)\n' "$extras"
    if [ -n "${STREAMTRAIN_TORCH_INDEX:-}" ]; then
        torch=$(grep -oE 'torch>=[^"]+' setup.py)
        if [ -d "$STREAMTRAIN_TORCH_INDEX" ]; then
            pip_install --no-deps --no-index --find-links "$STREAMTRAIN_TORCH_INDEX" "$torch"
        else
            pip_install --no-deps --index-url "$STREAMTRAIN_TORCH_INDEX" "$torch"
        fi
    fi
    pip_install --editable ".[$extras]"
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
        .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || printf '%s\n' \
            "warning: the installed PyTorch cannot use this machine's GPU driver, so everything would run on the" \
            "         CPU; point STREAMTRAIN_TORCH_INDEX at a build for your CUDA version (see pytorch.org)" >&2
    fi
}

# One stamp an extra, so that what was installed with more extras also serves those who want fewer.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then make_venv; fi
extras=("$(dali_extra)" "$@")
stamp=$( (cat setup.py; .venv/bin/python --version; echo "${STREAMTRAIN_TORCH_INDEX:-}") | sha256sum)
for extra in "${extras[@]}"; do
    if [ "$(cat ".venv/installed-$extra" 2>/dev/null)" != "$stamp" ]; then
        install "${extras[@]}"
        for extra in "${extras[@]}"; do printf '%s\n' "$stamp" >".venv/installed-$extra"; done
        break
    fi
done
