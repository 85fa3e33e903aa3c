#!/usr/bin/env bash
# Sourced by the launch scripts, after env.sh: starts the ranks so that a signal makes them save and stop.
set -euo pipefail

# threads_per_rank NPROC: this machine's cores shared out, unless OMP_NUM_THREADS says otherwise.
threads_per_rank() {
    local threads=$(($(nproc) / $1))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
}

# run_ranks LAUNCHER...: a launcher answers a signal with a traceback and exit code 1, so signals go past it: it runs in
# a session of its own, its ranks get the signal, save, and end with 0, and so does it.
run_ranks() {
    setsid "$@" &
    runner=$!
    local signal
    for signal in TERM INT HUP USR1; do
        # shellcheck disable=SC2064 - the name of this signal
        trap "forward_signal $signal" "$signal"
    done
    while kill -0 "$runner" 2>/dev/null; do wait "$runner" || true; done
    wait "$runner"
}

forward_signal() {
    local pids
    pids="$(cat "/proc/$runner/task"/*/children 2>/dev/null || pgrep -P "$runner")"
    [ "$1" != HUP ] || set -- TERM  # the ranks know TERM, INT and USR1
    # shellcheck disable=SC2086 - one word per rank
    kill -s "$1" ${pids:-$runner} 2>/dev/null || true
}

# fine_tune_arguments CONFIG NPROC: checks them, and sets `config` and `nproc`.
fine_tune_arguments() {
    [ $# -ge 2 ] || fail "Give a configuration and a number of processes: $0 <config> <nproc> [key=value ...]"
    config="$1" nproc="$2"
    [ -f "$config" ] || [ ! -f "$ROOT/$config" ] || config="$ROOT/$config"
    case "$nproc" in '' | 0* | *[!0-9]*) fail "nproc is $nproc: it must be a positive number of processes." ;; esac
}
