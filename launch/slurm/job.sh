#!/usr/bin/env bash
# Sourced by the sbatch scripts beside it, from the checkout: a job's name, its recipe, and its step on every node.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

# The same after a requeue, another one for every job and every task of an array.
job_name() {
    printf '%s' "$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}"
}

# The job's own folder, as YAML: a job may be called anything.
output_dir() {
    local quote="'" path
    path="$ROOT/runs/$(job_name)"
    printf "'%s'" "${path//$quote/$quote$quote}"
}

# With MODEL and CONTEXT, such as qwen2.5-7b and 256k: sets CONFIG to the recipe of that name.
choose_recipe() {
    CONFIG="configs/run/${MODEL:-}_${CONTEXT:-}.yaml"
    [ -n "${MODEL:-}" ] && [ -n "${CONTEXT:-}" ] && [ -f "$ROOT/$CONFIG" ] ||
        fail "MODEL is '${MODEL:-}' and CONTEXT is '${CONTEXT:-}', which name no recipe; configs/run has $(cd "$ROOT/configs/run" && echo *_*k.yaml)."
}

# node_address NODE: what the other nodes reach it by.
node_address() { scontrol --oneliner show node "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'; }

# run_on_nodes SCRIPT ARGUMENTS...: a script of launch/ on every node of the job. On USR1, Slurm's warning that the time
# is almost up (--signal=B:USR1@seconds), the ranks save and stop, and the job is queued again.
run_on_nodes() {
    local head job warned="" ending="" code=0 step
    head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
    # an array's last task has the number of the array, which would mean all of them
    job="${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}" job="${job:-$SLURM_JOB_ID}"
    export NNODES="$SLURM_JOB_NUM_NODES" MASTER_ADDR MASTER_PORT JOB_ID
    MASTER_ADDR="$(node_address "$head")"
    MASTER_PORT="${MASTER_PORT:-$((29400 + SLURM_JOB_ID % 1000))}"  # jobs that share a node differ
    JOB_ID="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
    trap 'warned=1; scancel --signal=USR1 "$job"' USR1
    trap 'ending=1' TERM  # a requeue or a preemption tells the ranks too: wait until they have saved
    srun --kill-on-bad-exit=1 bash "$ROOT/launch/slurm/node.sh" "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
        if [ -z "$ending" ]; then
            wait "$step" || true
        elif [[ "$(ps -ww -eo args=)" == *"$ROOT/launch/$1"* ]]; then
            sleep 1
        else
            # nothing is left here: srun waits for a node that is gone, and would end the step of the job's next start
            kill -KILL "$step" 2>/dev/null || true
        fi
    done
    wait "$step" || code=$?
    if [ -n "$warned" ]; then
        say "The time was almost up: the job is queued again."
        scontrol requeue "$job"
        return
    fi
    return "$code"
}
