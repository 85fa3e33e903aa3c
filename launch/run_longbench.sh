#!/usr/bin/env bash
# LongBench with a model of this repository or of transformers, from the data.zip of huggingface.co/datasets/THUDM/LongBench:
#
#   bash launch/run_longbench.sh OUT data.zip --hf DIR
#   bash launch/run_longbench.sh OUT data.zip --e --max-length 31500 --hf DIR
#   bash launch/run_longbench.sh OUT data.zip --protocol paper model.init_from=DIR training.precision=bf16
#   bash launch/run_longbench.sh OUT data.json --v2 --hf DIR
#
# Everything else: python tools/evaluate.py longbench --help. The same command goes on where it was stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[ $# -ge 3 ] || fail "Give a directory for the results, the data and a model: $0 OUT data.zip (--hf DIR | CONFIG...) [options]"
out="$1" data="$2"
shift 2
[ -e "$data" ] || fail "There is no $data; copy data.zip of huggingface.co/datasets/THUDM/LongBench there."
NPROC="${NPROC:-1}"
positive NPROC "$NPROC" processes

make_environment
launcher=(python)
[ "$NPROC" = 1 ] || launcher=(python -m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc-per-node="$NPROC")
exec "${launcher[@]}" "$ROOT/tools/evaluate.py" longbench --out "$out" --data "$data" "$@"
