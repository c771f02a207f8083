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

. scripts/environment.sh
installed test || {
    # DeepSpeed compiles what it needs when it is used, not when it is installed.
    export DS_BUILD_OPS=0
    install torch torchvision --editable ".[annotate,captions,cluster,dev,eval,quant,serve,synthetic,test-serve,timm,train,video]"
    .venv/bin/python scripts/install_torchvision_shim.py
    # The page's tests need a browser; where none can be got they are skipped.
    command -v chromium chromium-browser google-chrome >/dev/null ||
        timeout 300 .venv/bin/python -m playwright install chromium || true
    finish test
}

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Two workers, each with one thread (tests/conftest.py); the tests of a file share what it trained.
.venv/bin/python -m pytest -n 2 --dist loadfile "${markers[@]}" "$@"
