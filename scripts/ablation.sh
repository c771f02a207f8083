#!/usr/bin/env bash
# Trains and evaluates many small models on MMFR-Synthetic and puts them side by side: branches and fusions, with and
# without mapper, reasoning and FACL, three seeds each. If it was stopped, the same command resumes, run by run, also on
# another machine with the same disk. A run takes some minutes on two cores.
#
#     bash scripts/ablation.sh [FOLDER] [OPTION…]
#
# FOLDER (default: ablation_build) takes everything; FOLDER/table.md and FOLDER/page.html are the result. Options are
# those of python -m scripts.ablation, such as --seeds 1 2 3, --variants clip facl, --on ray, --table.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ "${1:-}" = "--help" ]; then
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
out=ablation_build
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    out=$1
    shift
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$root"
export TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-$root/.venv/bin/python}" -m scripts.ablation --out "$out" "$@"
