#!/usr/bin/env bash
# Fine-tune a Hugging Face model whose layers are shared by tp_size ranks (of the configuration), with nproc / tp_size
# replicas, started by accelerate's launcher where it is installed and by torchrun, which sets the same environment,
# where it is not:
#
#   bash launch/launch_tp_dp_accelerate.sh <config> <nproc> [key=value ...] [--eval-ppl]
#   bash launch/launch_tp_dp_accelerate.sh configs/qwen7b_fastmka.yaml 8 tp_size=4 --eval-ppl
#
# A second start of the same command resumes. SIGTERM, SIGINT and SIGUSR1 save at the next step and stop.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"
fine_tune_arguments "$@"
shift 2

make_environment

# A wrong configuration is one sentence from one process, before any rank starts.
WORLD_SIZE="$nproc" python "$ROOT/tools/train_hf.py" "$config" "$@" --print-config >/dev/null

threads_per_rank "$nproc"
launcher=(torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc-per-node="$nproc" --shutdown-timeout=600)
if python -c 'import accelerate' 2>/dev/null; then
    launcher=(accelerate.commands.launch --num_processes="$nproc" --num_machines=1 --main_process_port=0
        --mixed_precision=no --dynamo_backend=no)
    [ "$nproc" = 1 ] || launcher+=(--multi_gpu)  # several processes; they find out whether they have GPUs
else
    say "accelerate is not installed; torchrun starts the ranks."
fi
run_ranks python -m "${launcher[@]}" "$ROOT/tools/train_hf.py" "$config" "$@"
