#!/usr/bin/env bash
# Makes .venv, installs the package into it, and analyses the bundled samples with the embedded model: prints verdict,
# P(fake) and reasoning of each, and writes one HTML page. Images named as arguments are analysed as well.
# The first run installs for some minutes; later runs need no network. PYTHON=… chooses the interpreter.
#
#     bash scripts/demo.sh [--out PAGE.html] [IMAGE …]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ "${1:-}" = "--help" ]; then
    sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
(
    cd "$root"
    . scripts/environment.sh
    installed demo || installed test || {
        echo "installing into $root/.venv, once; torch is large" >&2
        install torch --editable .
        finish demo
    }
)
exec "$root/.venv/bin/python" -m forgery_eval.demo "$@"
