"""The same of ZeRO stage 3 (DeepSpeed 0.19, zero/stage3.py and partition_parameters.py): every rank holds a share of the
weights, and gathers those in use.

Letters: P elements of a rank's model, N ranks that share it (context x data), w bytes of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mka_megatron.planning.parameters import Parameter
from mka_megatron.planning.states import (
    BUCKET,
    Moment,
    Run,
    Term,
    backward_moments,
    elements,
    embedding_elements,
    filled,
    groups,
    largest,
)

LIVE = 1_000_000_000
"""stage3_max_live_parameters."""
PREFETCHED = 50_000_000
"""stage3_prefetch_bucket_size."""
PERSISTENT = 100_000
"""stage3_param_persistence_threshold."""
_FP32, _FP64 = 4, 8


def moments(run: Run, parameters: Sequence[Parameter], weights_offloaded: bool) -> list[Moment]:
    """The moments of a step at which memory may peak."""
    p, width, n = elements(parameters), run.width, run.shards
    owned = sum(-(-each.elements // n) for each in parameters)
    kept = sum(each.elements for each in parameters if each.elements <= PERSISTENT) if n > 1 else 0
    live = min(p - kept, LIVE + PREFETCHED) if n > 1 else 0
    if weights_offloaded:
        held = Term(kept * width, f"{kept:,} x {width} B kept whole, the others in host memory")
    else:
        held = Term((owned + kept) * width, f"{owned:,} x {width} B, and {kept:,} kept whole")
    gathered = _held(held, live, width)
    optimizer = Term(owned * 12, f"{owned:,} x 12 B (AdamW's moments, fp32 weights)")
    wide = 2 if run.precision == "fp16" else _FP32
    gradients = Term(owned * wide, f"{owned:,} x {wide} B")
    if run.offloaded:
        optimizer = gradients = Term(0, "in host memory")
    full = filled(parameters)
    standing = BUCKET if run.on_cuda else full
    bucket = Term(standing * run.communicated, f"the reduce bucket, {standing:,} x {run.communicated} B")
    # what is reduced: joined, on gloo copied once more, and in the dtype that gradients add up in
    copies = (1 if run.on_cuda else 2) * full * run.communicated + (full * _FP32 if run.communicated > width else 0)
    parts = -(-full // n) * wide if wide != run.communicated else 0
    reduced = Term(copies + parts, f"copies of a full bucket to reduce, {full:,} elements")
    embedding = embedding_elements(parameters)
    waiting = Term((1 + run.tied) * embedding * width, f"{1 + run.tied} gradients of the embedding, {embedding:,} x {width} B")
    loss, last, end, first = backward_moments(run, parameters, gathered, optimizer, gradients, gradients, (bucket,), (reduced,))
    # the backward pass gives up what it has used; the embedding is used last
    late = _held(held, min(live, embedding), width)
    left = _held(held, min(live, round(live * first.share) + embedding), width)
    found = [
        loss, last, replace(end, weights=late), replace(first, weights=left),
        Moment("the reduction of gradients", late, gradients, optimizer, (bucket, reduced, waiting)),
    ]  # fmt: skip
    if n > 1:
        # what is gathered ahead is there twice until all of it has been asked for
        ahead = min(PREFETCHED, max(0, live - PREFETCHED))
        flat = Term(ahead * width, f"weights gathered ahead, {ahead:,} x {width} B")
        found.append(Moment("the gathering of weights", gathered, gradients, optimizer, (bucket, flat), "whole"))
    if run.offloaded:
        return found
    most = -(-largest(parameters) // n)
    norm = Term(most * _FP64, f"the largest gradient in fp64, {most:,} x {_FP64} B")
    found.append(Moment("the gradient's norm", held, gradients, optimizer, (bucket, norm)))
    group = max(sum(-(-each.elements // n) for each in group) for group in groups(parameters))
    copy = Term(group * (_FP32 + (wide if wide < _FP32 else 0)), f"{group:,} gradients, flat for AdamW")
    found.append(Moment("the update", held, gradients, optimizer, (bucket, copy)))
    return found


def _held(held: Term, gathered: int, width: int) -> Term:
    """With so many elements of other ranks."""
    return Term(held.bytes + gathered * width, f"{held.words}, and {gathered:,} gathered")
