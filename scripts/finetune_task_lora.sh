#!/usr/bin/env bash
# Fine-tunes with LoRA by the published recipe, on any number of processes; `--help` has everything.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "error: $1" >&2
    exit 1
}

python=${PYTHON:-}
if [[ -z $python && -x $root/.venv/bin/python ]]; then python=$root/.venv/bin/python; fi
if [[ -z $python ]]; then python=$(command -v python || command -v python3) || fail "there is no python; PYTHON=… names one"; fi
export PYTHON=$python PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
"$python" -c 'import llava.train.launcher' >/dev/null 2>&1 ||
    fail "$python cannot run this project; install it there, or name another interpreter with PYTHON=…"
exec "$python" -m llava.train.launcher --recipe fakereasoning "$@"
