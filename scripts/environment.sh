# Makes .venv and installs into it; demo.sh and test.sh source this in the repository's root.
# PYTHON=… chooses the interpreter (default: python3.11, else python3).

# What an environment depends on: these files, and where they lie, since the package is not copied.
recipe() { { pwd && cat pyproject.toml constraints.txt scripts/environment.sh scripts/demo.sh scripts/test.sh; } | cksum; }

# installed NAME: whether the installation of that name was finished, by the same recipe.
installed() { [ -x .venv/bin/python ] && [ "$(cat ".venv/installed-$1" 2>/dev/null)" = "$(recipe)" ]; }

# finish NAME: marks it; an installation that was interrupted has no mark, and is resumed.
finish() { recipe > ".venv/installed-$1"; }

# install PACKAGE…
install() {
    .venv/bin/python -m pip --version >/dev/null 2>&1 || make_environment
    .venv/bin/python -m pip install --quiet --constraint constraints.txt "$@"
}

make_environment() {
    local python=${PYTHON:-$(command -v python3.11 || command -v python3 || echo python3)}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "error: $python is not Python 3.10 or newer; name one with PYTHON=…" >&2
        return 1
    fi
    "$python" -m venv .venv || { echo "error: $PWD/.venv cannot be made; remove it and run again" >&2; return 1; }
}
