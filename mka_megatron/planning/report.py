"""A plan as a table, as formulas, as JSON, and as the sentence that says why it does not fit."""

from __future__ import annotations

from typing import Any

from mka_megatron.planning.cluster import GIB
from mka_megatron.planning.compute import LINK_SHARE, link
from mka_megatron.planning.memory import Part
from mka_megatron.planning.plan import Plan, gib
from mka_megatron.planning.steps import tiled
from mka_megatron.planning.topologies import Overrides, cheapest_change, pasted

_DAY = 86_400
_NAME = 42


def refusal(plan: Plan, fix: str | None = None) -> str:
    """One sentence on the first memory that is too small: its largest part, need, have, and the cheapest change.

    `fix` replaces the last.
    """
    short = plan.shortages[0]
    if fix is None:
        overrides = cheapest_change(plan)
        fix = "no layout that is allowed fits here: use more nodes, a shorter data.sequence_length or a smaller model"
        if overrides is not None:
            fix = f"the cheapest change that makes it fit is {pasted(overrides)}"
    return (f"The run does not fit: {short.where} would need {gib(short.need)}, of which {short.largest.name} "
            f"{gib(short.largest.bytes)}, and has {gib(short.have)}; {fix}.")


def table(plan: Plan, tokens: float) -> str:
    """Everything in one table; `tokens` of the budget."""
    cluster, config = plan.cluster, plan.config
    lines = [_heading(plan), ""]
    if not cluster.on_cpu:
        lines += _memory("memory of a GPU", plan.device, cluster.device_bytes, cluster.device_reserve)
    lines += _memory("DRAM of a node", plan.dram, cluster.dram_bytes, cluster.dram_reserve)
    lines += _memory("SSD of a node", plan.ssd, cluster.ssd_bytes, 0)
    lines += [f"{'sent by a rank in a step':{_NAME}}{'GiB':>10}  {'ranks':>5}  {'link':13}  {'GB/s':>5}  {'s':>8}  not hidden"]
    for flow, whole, exposed in zip(plan.flows, plan.times.whole, plan.times.exposed, strict=True):
        at = link(cluster, plan.layout, flow.group)
        lines.append(f"  {flow.group + ': ' + flow.what:{_NAME - 2}.{_NAME - 2}}{flow.bytes / GIB:10,.3f}  {at.ranks:5}  {at.name:13}  "
                     f"{at.gbs:5g}  {whole:8.3f}  {exposed:10.3f}")
    if not plan.flows:
        lines.append("  nothing")
    done, took = plan.work, plan.times
    days = tokens / plan.tokens_per_second / _DAY
    lines += [
        "", "a step",
        f"  {'tokens':{_NAME}}{done.tokens:,}",
        f"  {'model FLOPs (forward, backward)':{_NAME}}{_engineering(done.model_flops)}FLOP",
        f"  {'recomputed on top':{_NAME}}{_engineering(done.recomputed_flops)}FLOP",
        f"  {'compute':{_NAME}}{took.compute:.3f} s at {plan.utilisation:.0%} of {cluster.gpu.tflops:g} TFLOP/s",
        f"  {'communication that is not hidden':{_NAME}}{sum(took.exposed):.3f} s at {LINK_SHARE:.0%} of the links",
        f"  {'optimizer':{_NAME}}{took.update:.3f} s",
        f"  {'time':{_NAME}}{took.step:.3f} s",
        "", "in all",
        f"  {'tokens per second':{_NAME}}{plan.tokens_per_second:,.0f} ({plan.tokens_per_second / cluster.world_size:,.0f} per rank)",
        f"  {'MFU (recomputation not counted)':{_NAME}}{plan.mfu:.1%}",
        f"  {f'{tokens:,.0f} tokens':{_NAME}}{days:,.2f} days ({days * 24 * cluster.world_size:,.0f} device hours)",
    ]
    if config.training.steps * done.tokens != tokens:
        run = config.training.steps * took.step / _DAY
        lines.append(f"  {f'the run of {config.training.steps:,} steps':{_NAME}}{run:,.2f} days")
    return "\n".join(lines)


def explained(plan: Plan) -> str:
    """The formula of every figure with its numbers."""
    config, done, took, layout = plan.config, plan.work, plan.times, plan.layout
    lines = ["formulas"]
    for where, parts in (("GPU", plan.device if not plan.cluster.on_cpu else ()), ("DRAM", plan.dram), ("SSD", plan.ssd)):
        lines += [f"  {where} {part.name}: {part.formula} = {part.bytes:,} B" for part in parts]
    if not plan.cluster.on_cpu:
        lines.append(f"  GPU reserve: 1.5 GiB (CUDA's context, NCCL) + 4% of {plan.cluster.gpu.memory_gib:g} GiB (gaps) = "
                     f"{plan.cluster.device_reserve:,} B")
    lines.append(f"  DRAM reserve: 0.7 GiB x {plan.cluster.per_node} ranks (the processes) = {plan.cluster.dram_reserve:,} B")
    for flow, whole in zip(plan.flows, took.whole, strict=True):
        at = link(plan.cluster, layout, flow.group)
        lines.append(f"  {flow.group} {flow.what}: {flow.formula} = {flow.bytes:,} B; / ({at.gbs:g} GB/s {at.name}, "
                     f"{at.per_node} of {at.ranks} ranks in a node, x {LINK_SHARE:g}) = {whole:.4f} s"
                     + (f"; hidden by the {'last backward pass' if flow.hidden_by == 'backward' else 'passes'} as far as it lasts"
                        if flow.hidden_by else ""))
    length = config.data.sequence_length
    lines += [
        f"  tokens: {config.training.global_batch_size:,} rows of {length:,}" + (
            "" if done.tokens == config.training.global_batch_size * length else ", of which the step's segments")
        + f" = {done.tokens:,}",
        f"  model FLOPs: 3 x (2 x weights per token x tokens + FLOPs per pair x {done.pairs:,} (query, key) pairs) = "
        f"{done.model_flops:,}; rows count as one document each",
        f"  recomputed: {_recomputed(plan)} = {done.recomputed_flops:,}",
        f"  compute: {done.rank_flops:,.0f} FLOP of the heaviest rank / ({plan.cluster.gpu.tflops:g}e12 x {plan.utilisation:g}) "
        f"= {took.compute:.4f} s",
        f"  time: {took.compute:.4f} compute + {sum(took.exposed):.4f} not hidden + {took.update:.4f} optimizer = {took.step:.4f} s",
        f"  tokens per second: {done.tokens:,} / {took.step:.4f} s = {plan.tokens_per_second:,.0f}",
        f"  MFU: {done.model_flops:,} / ({took.step:.4f} s x {plan.cluster.world_size} x {plan.cluster.gpu.tflops:g}e12) = {plan.mfu:.4f}",
    ]
    return "\n".join(lines)


def as_json(plan: Plan, tokens: float) -> dict[str, Any]:
    """Plain values: bytes, seconds, FLOPs."""
    cluster, layout = plan.cluster, plan.layout

    def parts(of: tuple[Part, ...]) -> list[dict[str, Any]]:
        return [{"name": part.name, "bytes": part.bytes, "formula": part.formula} for part in of]

    return {
        "cluster": {"gpu": cluster.gpu.key, "gpus_per_node": cluster.per_node, "nodes": cluster.nodes,
                    "device_bytes": cluster.device_bytes, "device_reserve": cluster.device_reserve,
                    "dram_bytes": cluster.dram_bytes, "dram_reserve": cluster.dram_reserve, "ssd_bytes": cluster.ssd_bytes},
        "layout": {"tensor": layout.tensor, "context": layout.context, "data": layout.data},
        "vocab_size": plan.vocab_size,
        "device": parts(plan.device), "dram": parts(plan.dram), "ssd": parts(plan.ssd),
        "flows": [{"group": flow.group, "what": flow.what, "bytes": flow.bytes, "formula": flow.formula,
                   "link": link(cluster, layout, flow.group).name, "seconds": whole, "not_hidden": exposed}
                  for flow, whole, exposed in zip(plan.flows, plan.times.whole, plan.times.exposed, strict=True)],
        "tokens": plan.work.tokens, "model_flops": plan.work.model_flops, "recomputed_flops": plan.work.recomputed_flops,
        "utilisation": plan.utilisation, "compute_seconds": plan.times.compute, "update_seconds": plan.times.update,
        "step_seconds": plan.times.step, "tokens_per_second": plan.tokens_per_second, "mfu": plan.mfu,
        "budget_tokens": tokens, "budget_days": tokens / plan.tokens_per_second / _DAY,
        "fits": not plan.shortages,
        "shortages": [{"where": each.where, "largest": each.largest.name, "need": each.need, "have": each.have}
                      for each in plan.shortages],
    }


def suggestions(ranked: list[tuple[Overrides, Plan]], most: int = 5) -> str:
    """The cheapest of `ranked`, and the first as overrides to paste."""
    lines = ["cheapest (fewest GPU seconds per token), of "
             f"{len(ranked)} layouts that fit", "  TP  CP    DP  ZeRO  offload  recompute    GiB     s/step   tokens/s  GPU s per 1e6 tokens"]
    for _, plan in ranked[:most]:
        layout, engine = plan.layout, plan.config.engine
        size = sum(part.bytes for part in (plan.dram if plan.cluster.on_cpu else plan.device))
        lines.append(f"{layout.tensor:4}{layout.context:4}{layout.data:6}{engine.zero_stage:6}  {engine.offload_optimizer:7}  "
                     f"{plan.config.training.recompute:9}{size / GIB:7.1f}{plan.times.step:11.3f}{plan.tokens_per_second:11,.0f}"
                     f"{plan.gpu_seconds_per_token * 1e6:22.1f}")
    return "\n".join([*lines, "", pasted(ranked[0][0])])


def _heading(plan: Plan) -> str:
    config, cluster, layout, engine = plan.config, plan.cluster, plan.layout, plan.config.engine
    offload = "".join(f", {what} on {where}" for what, where in (("optimizer", engine.offload_optimizer), ("weights", engine.offload_param))
                      if where != "none")
    return (f"{cluster.nodes} x {cluster.per_node} {cluster.gpu.key}: tensor {layout.tensor}"
            f"{' (sequence parallel)' if config.parallel.sequence_parallel else ''} x context {layout.context} x data "
            f"{layout.data}, ZeRO-{engine.zero_stage}{offload}, recompute {config.training.recompute}\n"
            f"{config.model.num_layers} layers of {config.attention.variant}, {plan.vocab_size:,} entries, sequences of "
            f"{config.data.sequence_length:,}, {config.training.global_batch_size:,} a step in micro-batches of "
            f"{config.training.micro_batch_size}, {config.training.precision}")


def _memory(name: str, parts: tuple[Part, ...], have: int | None, reserve: int) -> list[str]:
    if not parts:
        return []
    total = sum(part.bytes for part in parts)
    end = "not given, not checked"
    if have is not None:
        end = f"{(have - reserve) / GIB:,.2f} ({have / GIB:,.1f} less a reserve of {reserve / GIB:.1f}): "
        end += "fits" if total <= have - reserve else "DOES NOT FIT"
    return [f"{name:{_NAME}}{'GiB':>10}", *(f"  {part.name:{_NAME - 2}}{part.bytes / GIB:10,.2f}" for part in parts),
            f"  {'in all':{_NAME - 2}}{total / GIB:10,.2f}  of {end}", ""]


def _recomputed(plan: Plan) -> str:
    config, layout, training = plan.config, plan.layout, plan.config.training
    said = {"none": [], "selective": ["the attention products"], "full": ["the layers' forward"]}[training.recompute]
    said += ["the MLPs' forward (tiles)"] if tiled(config, layout, training.mlp_tile) else []
    said += ["the output layer (tiles)"] if tiled(config, layout, training.logits_tile) else []
    return " + ".join(said) or "nothing"


def _engineering(value: float) -> str:
    """With a prefix of a thousand's power."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= size:
            return f"{value / size:,.2f} {prefix}"
    return f"{value:,.0f} "
