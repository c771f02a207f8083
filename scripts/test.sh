#!/usr/bin/env bash
# Makes .venv, installs what the tests need, and runs them: the fast ones, or with --all also the slow ones.
# Further arguments go to pytest. PYTHON=… chooses the interpreter (default: python3.11, else python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

markers=(-m "not slow")
if [ "${1:-}" = "--help" ]; then
    sed -n '2,3s/^# //p' "$0"
    exit 0
fi
if [ "${1:-}" = "--all" ]; then
    markers=()
    shift
fi

python=${PYTHON:-$(command -v python3.11 || command -v python3)}
[ -x .venv/bin/python ] || "$python" -m venv .venv
wanted=$(cat pyproject.toml constraints.txt scripts/test.sh | sha256sum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
    .venv/bin/python -m pip install --quiet --constraint constraints.txt torch torchvision \
        --editable ".[annotate,dev,eval,quant,synthetic,timm]"
    .venv/bin/python scripts/install_torchvision_shim.py
    echo "$wanted" > .venv/installed
fi

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest "${markers[@]}" "$@"
