#!/usr/bin/env bash
# What srun starts on every node of a job: node.sh SCRIPT ARGUMENTS... is that script of launch/ as one machine of several.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"
export NODE_RANK="$SLURM_NODEID" LOCAL_ADDR
LOCAL_ADDR="$(node_address "$SLURMD_NODENAME")"
exec bash "$ROOT/launch/$1" "${@:2}"
