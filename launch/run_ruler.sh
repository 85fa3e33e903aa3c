#!/usr/bin/env bash
# RULER v1 with a model of this repository or of transformers:
#
#   bash launch/run_ruler.sh OUT --hf DIR                                # 4K to 32K tokens, 500 samples a task
#   bash launch/run_ruler.sh OUT configs/run/tiny.yaml --lengths 1024,2048 --samples 20 --tasks generated
#   NPROC=2 bash launch/run_ruler.sh OUT model.init_from=DIR parallel.tensor_parallel=2
#
# Without squad.json and hotpotqa.json the two question tasks are left out by --tasks generated; --data names the folder
# of the files. Everything else: python tools/evaluate.py ruler --help. The same command goes on where it was stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[ $# -ge 2 ] || fail "Give a directory for the results and a model: $0 OUT (--hf DIR | CONFIG...) [options]"
out="$1"
shift
NPROC="${NPROC:-1}"
positive NPROC "$NPROC" processes

make_environment
case " $* " in *" --lengths "*) ;; *) set -- --lengths 4096,8192,16384,32768 "$@" ;; esac
launcher=(python)
[ "$NPROC" = 1 ] || launcher=(python -m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc-per-node="$NPROC")
exec "${launcher[@]}" "$ROOT/tools/evaluate.py" ruler --out "$out" "$@"
