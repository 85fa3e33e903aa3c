#!/usr/bin/env bash
# Fine-tune a Hugging Face model on replicas that share every step's samples (DDP), started by torchrun:
#
#   bash launch/launch_dp_torchrun.sh <config> <nproc> [key=value ...] [--eval-ppl]
#   bash launch/launch_dp_torchrun.sh configs/hf_qwen_fastmka.yaml 8 'data.train=[corpus.jsonl]' --eval-ppl
#
# Several machines: start it on each, with the variables that run_torchrun in ranks.sh names.
# A second start of the same command resumes. SIGTERM, SIGINT and SIGUSR1 save at the next step and stop.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"
fine_tune_arguments "$@"
shift 2

make_environment

# A wrong configuration is one sentence from one process, before torchrun starts any.
WORLD_SIZE="$((nproc * ${NNODES:-1}))" python "$ROOT/tools/train_hf.py" "$config" "$@" --print-config >/dev/null

run_torchrun "$nproc" "$ROOT/tools/train_hf.py" "$config" "$@"
