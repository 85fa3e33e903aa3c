#!/usr/bin/env bash
# Train a Qwen-shaped FastMKA model on whatever this machine has. From a fresh clone:
#
#   bash launch/pretrain_qwen_fastmka.sh                                   # the tiny model, Python's own sources
#   CONFIG=configs/run/qwen2.5-7b.yaml NPROC=8 bash launch/pretrain_qwen_fastmka.sh 'data.train=[corpus.jsonl]'
#   bash launch/pretrain_qwen_fastmka.sh attention.variant=gqa training.output_dir=runs/gqa
#   bash launch/pretrain_qwen_fastmka.sh --help                            # every key
#
# A second start of the same command resumes. SIGTERM, SIGINT and SIGUSR1 save at the next step and stop.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

CONFIG="${CONFIG:-$ROOT/configs/run/tiny.yaml}"
[ -f "$CONFIG" ] || [ ! -f "$ROOT/$CONFIG" ] || CONFIG="$ROOT/$CONFIG"

make_environment

for argument in "$@"; do
    case "$argument" in -h | --help | --print-config) exec python -m mka_megatron.training "$CONFIG" "$@" ;; esac
done

gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
if [ "$gpus" = 0 ] && command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    say "This machine has a GPU that the installed torch cannot use (a CPU build, or an old driver); training on the CPU."
fi
NPROC="${NPROC:-$((gpus > 0 ? gpus : 1))}"
case "$NPROC" in '' | 0* | *[!0-9]*) fail "NPROC is $NPROC: it must be a positive number of processes." ;; esac
[ "$gpus" = 0 ] || [ "$NPROC" -le "$gpus" ] || fail "NPROC is $NPROC but this machine has $gpus GPUs; lower it."

# A wrong configuration is one sentence from one process, before torchrun starts any.
WORLD_SIZE="$NPROC" python -m mka_megatron.training "$CONFIG" "$@" --print-config >/dev/null

threads=$(($(nproc) / NPROC))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
# torchrun answers a signal with a traceback and exit code 1, so signals go past it: it runs in a session of its
# own, its ranks get the signal, save, and end with 0, and so does it.
setsid python -m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc-per-node="$NPROC" \
    --shutdown-timeout=600 -m mka_megatron.training "$CONFIG" "$@" &
runner=$!
ranks() { cat "/proc/$runner/task"/*/children 2>/dev/null || pgrep -P "$runner"; }
forward() {
    local pids
    pids="$(ranks)"
    # shellcheck disable=SC2086 - one word per rank
    kill -s "$1" ${pids:-$runner} 2>/dev/null || true
}
for signal in TERM INT HUP USR1; do
    # shellcheck disable=SC2064 - the name of this signal
    trap "forward $signal" "$signal"
done
while kill -0 "$runner" 2>/dev/null; do wait "$runner" || true; done
wait "$runner"
