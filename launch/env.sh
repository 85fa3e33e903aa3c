#!/usr/bin/env bash
# Sourced by the launch scripts and by CI: makes the virtual environment, installs the pinned packages and
# builds DeepSpeed's I/O operators ahead of the run. Everything is skipped when it is already there.
#
#   VENV    where the environment lives (default: .venv beside this repository's README)
#   PYTHON  the interpreter to make it from (default: python3)
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}" VENV="${VENV%/}"
# A directory of our own for just-in-time builds: while we hold its lock, a lock file in it is a leftover.
export TORCH_EXTENSIONS_DIR="$VENV/torch_extensions"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 DEBIAN_FRONTEND=noninteractive

say() { printf '%s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

# positive NAME VALUE THINGS: refuses what is not a number from 1 on.
positive() { case "$2" in '' | 0* | *[!0-9]*) fail "$1 is $2: it must be a positive number of $3." ;; esac; }

# apt_install PACKAGE...: true when root could install them.
apt_install() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    say "Installing system packages: $*"
    { timeout 300 apt-get -o Acquire::Retries=1 -o Acquire::http::Timeout=30 update &&
        timeout 600 apt-get install -y --no-install-recommends "$@"; } </dev/null >/dev/null 2>&1
}

has_venv() { [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; }

make_venv() {
    ! has_venv || return 0
    # making it empties the folder
    [ -f "$VENV/pyvenv.cfg" ] || [ -z "$(ls -A "$VENV" 2>/dev/null)" ] ||
        fail "VENV is $VENV, which is there and is no virtual environment; name a folder that may be made, or remove it."
    local python="${PYTHON:-python3}"
    command -v "$python" >/dev/null || fail "There is no $python; install Python 3.10 or newer, or name one with PYTHON=."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$python is older than Python 3.10; name a newer one with PYTHON=."
    say "Making the virtual environment $VENV"
    "$python" -m venv --clear "$VENV" >/dev/null 2>&1 && return
    apt_install python3-venv && "$python" -m venv --clear "$VENV" >/dev/null 2>&1 && return
    rm -rf "$VENV"
    fail "$python cannot make a virtual environment; install its venv module (Debian and Ubuntu: python3-venv)."
}

wanted_packages() { cat "$ROOT/constraints.txt" "$ROOT/pyproject.toml" <(printf '%s' "$ROOT") | sha256sum; }

has_packages() { [ -f "$VENV/installed.sha256" ] && [ "$(cat "$VENV/installed.sha256")" = "$(wanted_packages)" ]; }

install_packages() {
    ! has_packages || return 0
    say "Installing the pinned packages (a few minutes the first time)"
    local pip=("$VENV/bin/python" -m pip install -q -c "$ROOT/constraints.txt")
    # torch first, so that a build of that version which is already there or preferred by pip's settings stays
    "${pip[@]}" "$(grep '^torch==' "$ROOT/constraints.txt")" setuptools ninja ||
        fail "pip could not install torch and setuptools; the message above says why."
    "${pip[@]}" --no-build-isolation -e "$ROOT[test,evaluation]" ||
        fail "pip could not install the pinned packages; the message above says why."
    wanted_packages >"$VENV/installed.sha256"
}

python_header() { [ -f "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h" ]; }

libaio() { printf '#include <libaio.h>\nint main() { return 0; }\n' | g++ -x c++ - -laio -o /dev/null 2>/dev/null; }

# What mka_megatron.training.ops builds: asynchronous I/O for NVMe offload, and the fused optimizer on a GPU.
build_operators() {
    local state="$VENV/operators" before="" reason=""
    [ ! -f "$state" ] || before="$(cat "$state")"
    [ "$before" != built ] || return 0
    if [ "$before" = failed ]; then
        reason="DeepSpeed's operators did not compile, see $VENV/operators.log; remove $state to try again"
    elif ! command -v g++ >/dev/null; then
        reason="g++ is missing"
    elif ! { libaio && python_header; }; then
        local packages=()
        libaio || packages+=(libaio-dev)
        python_header || packages+=(python3-dev)
        if [ -n "$before" ] || ! apt_install "${packages[@]}" || ! libaio || ! python_header; then
            reason="${packages[*]} is missing"
        fi
    fi
    if [ -z "$reason" ]; then
        say "Building DeepSpeed's operators (a minute or two the first time)"
        if build_operators_now; then
            printf 'built\n' >"$state"
            return
        fi
        before=failed
        reason="DeepSpeed's operators do not compile here, see $VENV/operators.log"
    fi
    printf '%s\n' "${before:-missing}" >"$state"
    say "NVMe offload is unavailable ($reason); everything else works."
}

build_operators_now() {
    (
        flock 9
        find "$TORCH_EXTENSIONS_DIR" -maxdepth 3 -name lock -delete 2>/dev/null || true
        PATH="$VENV/bin:$PATH" MAX_JOBS="$(nproc)" timeout 1800 \
            "$VENV/bin/python" -m mka_megatron.training.ops >"$VENV/operators.log" 2>&1 &&
            grep -q '^async_io: built' "$VENV/operators.log"
    ) 9>"$VENV/operators.lock"
}

make_environment() {
    if ! { has_venv && has_packages; }; then
        mkdir -p "$(dirname "$VENV")"
        (
            # several starts at once, such as the tasks of an array, make it once
            flock -n 9 || { say "Another start makes $VENV; waiting for it." && flock 9; } || true
            make_venv
            install_packages
        ) 9>"$VENV.lock"
    fi
    build_operators
    export PATH="$VENV/bin:$PATH"  # ninja, for what is still built just in time
}
