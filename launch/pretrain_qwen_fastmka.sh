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
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec bash "$here/torchrun.sh" "${CONFIG:-$here/../configs/run/tiny.yaml}" "$@"
