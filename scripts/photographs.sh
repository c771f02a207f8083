#!/usr/bin/env bash
# Gathers freely licensed photographs out of Debian packages, those that the embedded model learns from. Nothing is
# installed; it needs Debian or a relative of it, with its package lists (apt-get update), and a network.
#
#     bash scripts/photographs.sh FOLDER
#
# FOLDER takes the photographs, named by package and file. scripts/photographs.txt lists them, a package and a path a
# line: drawings and renders that these packages have too would be taken for photographs. What a package of another
# version lacks is named and left out; with nothing at all the status is 1. Authors and licences stand in each package's
# copyright file, kept in FOLDER/copyright.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ "${1:-}" = "--help" ] || [ $# -ne 1 ]; then
    sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    [ "${1:-}" = "--help" ] || exit 2
    exit 0
fi
command -v apt-get dpkg >/dev/null || { echo "error: this needs apt-get and dpkg" >&2; exit 1; }
mkdir -p "$1/copyright"
out=$(cd "$1" && pwd)
list=$root/scripts/photographs.txt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

gathered=0 missing=0
for package in $(cut -d ' ' -f 1 "$list" | sort -u); do
    echo "$package"
    if ! apt-get download --quiet --quiet --option APT::Sandbox::User="$(id -un)" "$package" >/dev/null; then
        echo "  cannot be had; left out" >&2
        missing=$((missing + $(grep -c "^$package " "$list")))
        continue
    fi
    dpkg -x "$package"_*.deb "$package"
    cp "$package/usr/share/doc/$package/copyright" "$out/copyright/$package" || echo "  has no copyright file" >&2
    while read -r path; do
        if [ -f "$package/$path" ]; then
            name=${path#usr/share/} # with its folders: some are called after their size alone
            cp "$package/$path" "$out/${package}_${name//\//_}"
            gathered=$((gathered + 1))
        else
            echo "  $path is not in this version; left out" >&2
            missing=$((missing + 1))
        fi
    done < <(sed -n "s/^$package //p" "$list")
    rm -rf "$package" "$package"_*.deb
done
[ "$gathered" -gt 0 ] || { echo "error: nothing could be had; is there a network, and was apt-get update run?" >&2; exit 1; }
echo "$gathered photographs in $out, $missing left out"
