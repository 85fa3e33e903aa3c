#!/usr/bin/env bash
# Train with a configuration on this machine, or on this machine's share of a job over several:
#
#   bash launch/torchrun.sh configs/run/qwen2.5-7b.yaml 'data.train=[corpus.jsonl]'
#   NNODES=2 MASTER_ADDR=node1 NODE_RANK=0 bash launch/torchrun.sh configs/run/qwen2.5-7b.yaml ...   # on node1
#   NNODES=2 MASTER_ADDR=node1 NODE_RANK=1 bash launch/torchrun.sh configs/run/qwen2.5-7b.yaml ...   # on the other
#
# NPROC: ranks on this machine (default: its GPUs, or one). The other variables are those of run_torchrun in ranks.sh;
# MAX_RESTARTS is 3 here where there are several ranks: they are started anew when one of them dies or hangs.
# A second start of the same command resumes. SIGTERM, SIGINT and SIGUSR1 save at the next step and stop.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"

[ $# -ge 1 ] || fail "Give a configuration: $0 CONFIG [section.key=value ...]"
config="$1"
shift
[ -f "$config" ] || [ ! -f "$ROOT/$config" ] || config="$ROOT/$config"
positive NNODES "${NNODES:-1}" machines

make_environment

for argument in "$@"; do
    case "$argument" in -h | --help) exec python -m mka_megatron.training "$config" "$@" ;; esac
done

gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
if [ "$gpus" = 0 ] && command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    say "This machine has a GPU that the installed torch cannot use (a CPU build, or an old driver); training on the CPU."
fi
NPROC="${NPROC:-$((gpus > 0 ? gpus : 1))}"
positive NPROC "$NPROC" processes
[ "$gpus" = 0 ] || [ "$NPROC" -le "$gpus" ] || fail "NPROC is $NPROC but this machine has $gpus GPUs; lower it."

# A wrong configuration is one sentence from one process, before torchrun starts any.
ranks=$((NPROC * ${NNODES:-1}))
merged="$(WORLD_SIZE="$ranks" python -m mka_megatron.training "$config" "$@" --print-config)"
for argument in "$@"; do
    [ "$argument" != --print-config ] || { printf '%s\n' "$merged"; exit; }
done

[ "$ranks" = 1 ] || export MAX_RESTARTS="${MAX_RESTARTS:-3}"
run_torchrun "$NPROC" -m mka_megatron.training "$config" "$@"
