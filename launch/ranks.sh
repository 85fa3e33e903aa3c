#!/usr/bin/env bash
# Sourced by the launch scripts, after env.sh: starts the ranks so that a signal makes them save and stop.
set -euo pipefail

# threads_per_rank NPROC: this machine's cores shared out, unless OMP_NUM_THREADS says otherwise.
threads_per_rank() {
    local threads=$(($(nproc) / $1))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
}

# run_ranks LAUNCHER...: a launcher answers a signal with a traceback and exit code 1, so signals go past it: it runs in
# a session of its own, its ranks get the signal, save, and end with 0, and so does it. USR1, which Slurm sends to every
# process of a step, would kill it.
run_ranks() {
    (trap '' USR1 && exec setsid "$@") &
    runner=$! asked=""  # asked: when the first signal came
    local signal
    for signal in TERM INT HUP USR1; do
        # shellcheck disable=SC2064 - the name of this signal
        trap "forward_signal $signal" "$signal"
    done
    while kill -0 "$runner" 2>/dev/null; do wait "$runner" || true; done
    wait "$runner"
}

# run_torchrun NPROC PROGRAM...: NPROC ranks of a Python program on this machine: all there are or, where NNODES says how
# many machines share the job, those of machine NODE_RANK (0, 1, ...). The machines meet at MASTER_ADDR, which is machine
# 0, and MASTER_PORT (default 29400). LOCAL_ADDR: this machine as the others reach it (default: its name). A job that is
# started again on some machines while others still wind down needs a new JOB_ID. MAX_RESTARTS (default 0): how often the
# ranks are started anew, from the newest checkpoint, after one of them failed.
run_torchrun() {
    local nproc="$1" meet=(--standalone --local-addr=127.0.0.1)
    shift
    threads_per_rank "$nproc"
    if [ "${NNODES:-1}" != 1 ]; then
        [ -n "${MASTER_ADDR:-}" ] && [ -n "${NODE_RANK:-}" ] ||
            fail "NNODES is $NNODES: set MASTER_ADDR to machine 0 and NODE_RANK to this machine's number."
        case "$NODE_RANK" in 0?* | *[!0-9]*) false ;; *) [ "$NODE_RANK" -lt "$NNODES" ] ;; esac ||
            fail "NODE_RANK is $NODE_RANK: it must be this machine's number among the $NNODES of NNODES, counted from 0."
        meet=(--nnodes="$NNODES" --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:${MASTER_PORT:-29400}"
            --rdzv-id="${JOB_ID:-mka}" --rdzv-conf="is_host=$((NODE_RANK == 0))"
            --local-addr="${LOCAL_ADDR:-$(hostname -f)}")
    fi
    # in a shared store, ranks started anew meet the addresses of those before
    [ "${NNODES:-1}" = 1 ] && [ "${MAX_RESTARTS:-0}" = 0 ] || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    run_ranks python -m torch.distributed.run "${meet[@]}" --nproc-per-node="$nproc" \
        --max-restarts="${MAX_RESTARTS:-0}" --shutdown-timeout=600 "$@"
}

forward_signal() {
    local pids
    pids="$(cat "/proc/$runner/task"/*/children 2>/dev/null || pgrep -P "$runner" || true)"
    [ "$1" != HUP ] || set -- TERM  # the ranks know TERM, INT and USR1
    # A launcher starts ranks anew that a signal ends: where they would not save, at the start or told twice, it ends too.
    # shellcheck disable=SC2086 - one word per rank
    if [ "$1" != USR1 ] && { [ $((SECONDS - ${asked:=$SECONDS})) -gt 2 ] || ! listening $pids; }; then
        say "The ranks end at once: this was a second signal, or it came while they were not training."
        kill -s TERM "$runner" $pids 2>/dev/null || true
    else
        asked="${asked:-$SECONDS}"
        kill -s "$1" ${pids:-$runner} 2>/dev/null || true
    fi
}

# listening PID...: whether each has a handler for TERM (bit 14 of the mask), as ranks have while they train.
listening() {
    local pid
    for pid; do grep -q '^SigCgt:.*[4-7c-f]...$' "/proc/$pid/status" 2>/dev/null || return 1; done
    [ $# -gt 0 ]
}

# fine_tune_arguments CONFIG NPROC: checks them, and sets `config` and `nproc`.
fine_tune_arguments() {
    [ $# -ge 2 ] || fail "Give a configuration and a number of processes: $0 <config> <nproc> [key=value ...]"
    config="$1" nproc="$2"
    [ -f "$config" ] || [ ! -f "$ROOT/$config" ] || config="$ROOT/$config"
    positive nproc "$nproc" processes
    positive NNODES "${NNODES:-1}" machines
}
