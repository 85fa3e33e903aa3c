"""Will it fit, how long will it take: memory, traffic, FLOPs and time of a configuration on a cluster. Nothing is built.

    python tools/plan.py configs/run/qwen2.5-7b.yaml --gpu h100-80g --nodes 4
    python tools/plan.py configs/run/qwen2.5-7b.yaml training.recompute=none --gpu h100-80g --nodes 4 --explain
    python tools/plan.py configs/run/qwen2.5-7b.yaml --gpu a100-40g --nodes 2 --dram-gib 1024 --suggest
    python tools/plan.py configs/run/tiny.yaml --gpu cpu --gpus-per-node 1 --dram-gib 8

Exit codes: 0 it fits; 1 it does not, and one sentence on stderr names the part and the cheapest change; 2 the
configuration or the cluster is wrong. docs/planning.md says what is computed and where its limits are.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mka_megatron.config.errors import ConfigError, refuse
from mka_megatron.config.load import load_config
from mka_megatron.planning.cluster import GIB, Cluster, gpu_by_key
from mka_megatron.planning.compute import UTILISATION
from mka_megatron.planning.plan import make_plan, vocabulary
from mka_megatron.planning.report import as_json, explained, refusal, suggestions, table
from mka_megatron.planning.topologies import apply, suggest

_MOST = 65_536


def main() -> int:
    chosen = options()
    try:
        return run(chosen)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="+", help="configuration files and section.key=value overrides")
    parser.add_argument("--gpu", default="h100-80g", help="of every rank; cpu for ranks on processor cores")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--dram-gib", type=float, help="memory of a node; not given: not checked")
    parser.add_argument("--ssd-gib", type=float, help="free disk of a node; not given: not checked")
    parser.add_argument("--link-gbs", type=float, help="between GPUs of a node, 1e9 B/s in one direction; default: the table's")
    parser.add_argument("--network-gbs", type=float, help="between nodes, per GPU, likewise")
    parser.add_argument("--utilisation", type=float, default=UTILISATION,
                        help=f"share of the GPU's peak that forward and backward reach (default {UTILISATION})")
    parser.add_argument("--tokens", type=float, default=1e9, help="budget (default 1e9)")
    parser.add_argument("--explain", action="store_true", help="print the formula of every figure with its numbers")
    parser.add_argument("--suggest", action="store_true",
                        help="find the cheapest layout, ZeRO stage, offload and recomputation that fit on this cluster")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_intermixed_args()


def run(chosen: argparse.Namespace) -> int:
    cluster = described(chosen)
    overrides = [each for each in chosen.config if "=" in each]
    paths = [each for each in chosen.config if "=" not in each]
    config = load_config(paths, overrides, world_size=None if chosen.suggest else cluster.world_size)
    vocab_size, assumed = vocabulary(config)
    if chosen.suggest:
        ranked = suggest(config, cluster, vocab_size, chosen.utilisation)
        if not ranked:
            print(f"No layout that is allowed fits on {cluster.nodes} x {cluster.per_node} {cluster.gpu.key}; use more nodes, "
                  "a shorter data.sequence_length, or training.logits_tile and training.mlp_tile.", file=sys.stderr)
            return 1
        print(suggestions(ranked), end="\n\n")
        config = apply(config, ranked[0][0])
    plan = make_plan(config, cluster, vocab_size, chosen.utilisation)
    print(table(plan, chosen.tokens))
    if chosen.explain:
        print("\n" + explained(plan))
    if assumed:
        print(f"\n{assumed}.")
    if chosen.json:
        write(chosen.json, json.dumps(as_json(plan, chosen.tokens), indent=2) + "\n")
    if plan.shortages:
        sys.stdout.flush()
        print(refusal(plan), file=sys.stderr)
        return 1
    return 0


def described(chosen: argparse.Namespace) -> Cluster:
    """The cluster of the command line; raises ConfigError where it cannot exist."""
    gpu = gpu_by_key(chosen.gpu)
    for name in ("gpus_per_node", "nodes", "dram_gib", "ssd_gib", "link_gbs", "network_gbs", "tokens", "utilisation"):
        value = getattr(chosen, name)
        if value is not None and not 0 < value < 1e18:
            raise refuse(f"--{name.replace('_', '-')}", value, "it must be greater than 0, and finite")
    for name in ("gpus_per_node", "nodes"):
        if getattr(chosen, name) > _MOST:
            raise refuse(f"--{name.replace('_', '-')}", getattr(chosen, name), f"it must be at most {_MOST}")
    if chosen.utilisation > 1:
        raise refuse("--utilisation", chosen.utilisation, "it is a share of the peak; give at most 1")
    if gpu.key == "cpu" and chosen.dram_gib is None:
        raise refuse("--gpu", "cpu", "its ranks work in the node's memory; give --dram-gib too")
    links = {"link_gbs": chosen.link_gbs, "network_gbs": chosen.network_gbs}
    gpu = replace(gpu, **{name: value for name, value in links.items() if value is not None})
    dram, ssd = (None if size is None else int(size * GIB) for size in (chosen.dram_gib, chosen.ssd_gib))
    return Cluster(gpu, chosen.gpus_per_node, chosen.nodes, dram, ssd)


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise refuse("--json", str(path), f"it cannot be written ({error.strerror}); give another path") from None


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    sys.exit(main())
