"""What DeepSpeed 0.19 holds of weights, gradients and optimizer states on one rank, moment by moment, ZeRO stages 0-2.

Read in its source (runtime/engine.py, fp16/unfused_optimizer.py, bf16_optimizer.py, zero/stage_1_and_2.py) and checked
against measurement (docs/planning_measured.md). Stage 3 is in sharded_states.py.

Letters: P elements of a rank's model, N ranks that share its states (context x data), w bytes of a weight.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from mka_megatron.planning.parameters import Parameter

BUCKET = 50_000_000
"""Elements of training/deepspeed_config.py's reduce bucket."""
FLATTENED = 500_000_000
"""Elements that stage 0 and BF16_Optimizer flatten at a time (engine.MEMORY_OPT_ALLREDUCE_SIZE)."""
_FP32, _FP64 = 4, 8
_MOMENTS = 8
"""Bytes of AdamW's two moments."""


@dataclass(frozen=True)
class Term:
    """Bytes, and in words what they are."""

    bytes: int
    words: str


@dataclass(frozen=True)
class Moment:
    """A moment of a step."""

    name: str
    weights: Term
    gradients: Term
    optimizer: Term
    workspace: tuple[Term, ...] = ()
    graph: str = "gone"
    """Of the activations: loss (all of them, and the logits), whole (all of them, a layer's being at work), last (one
    layer's, at the end of the backward pass), or gone."""
    share: float = 1.0
    """Of the layers whose activations are left."""


@dataclass(frozen=True)
class Run:
    """What the states depend on besides the parameters."""

    stage: int
    precision: str
    shards: int
    """Ranks that ZeRO partitions over: context x data."""
    context: int
    passes: int
    """Forward and backward passes of an optimizer step."""
    tied: bool
    offloaded: bool
    """The optimizer is in host memory (or on NVMe)."""
    on_cuda: bool

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return _FP32 if self.precision == "fp32" else 2

    @property
    def buffers(self) -> int:
        """Reduce buckets that are allocated: two where communication overlaps."""
        return 2 if self.on_cuda else 1

    @property
    def communicated(self) -> int:
        """Bytes of a gradient on the wire: DeepSpeed reduces in fp32 over a sequence that is shared."""
        return _FP32 if self.context > 1 else self.width


def moments(run: Run, parameters: Sequence[Parameter]) -> list[Moment]:
    """The moments of a step at which memory may peak, of ZeRO stages 0 to 2."""
    if run.stage == 0:
        return _unsharded(run, parameters)
    if run.stage == 1 and run.precision == "bf16" and not run.offloaded:
        return _bf16(run, parameters)
    return _sharded(run, parameters)


def elements(parameters: Sequence[Parameter]) -> int:
    """P."""
    return sum(each.elements for each in parameters)


def groups(parameters: Sequence[Parameter]) -> list[list[Parameter]]:
    """AdamW's: with weight decay, and without."""
    split = [[each for each in parameters if each.decayed is kind] for kind in (True, False)]
    return [group for group in split if group]


def filled(parameters: Sequence[Parameter]) -> int:
    """Elements of the fullest reduce bucket, parameters larger than one included (they go by themselves)."""
    most = held = 0
    for each in parameters:
        if held + each.elements > BUCKET:
            most, held = max(most, held), 0
        if each.elements > BUCKET:
            most = max(most, each.elements)
        else:
            held += each.elements
    return max(most, held)


def touched(parameters: Sequence[Parameter], shards: int) -> int:
    """Elements of the parameters that lie at least in part in a rank's partition, on the rank with most of them."""
    return sum(_touched(group, shards) for group in groups(parameters))


def _touched(group: Sequence[Parameter], shards: int) -> int:
    ends = list(accumulate(each.elements for each in group))
    starts = [0, *ends[:-1]]
    size = -(-ends[-1] // shards)
    most = 0
    for rank in {start // size for start in starts}:  # another has a piece of one parameter, which one of these has too
        first = bisect_right(ends, rank * size)
        last = bisect_left(ends, min((rank + 1) * size, ends[-1]))
        most = max(most, ends[last] - starts[first])
    return most


def backward_moments(run: Run, parameters: Sequence[Parameter], weights: Term, optimizer: Term, carried: Term,
                     kept: Term, buffers: tuple[Term, ...] = (), reduced: tuple[Term, ...] | None = None) -> list[Moment]:
    """From the end of the forward pass to the end of the backward pass.

    Args:
        carried: gradients of earlier passes.
        kept: all that the backward pass leaves; the embedding's last one comes on top.
        buffers: in use from the first gradient on; on a CPU memory is in use once it is written.
        reduced: copies of a full bucket, where buckets are reduced during the backward pass; None: they are not.
    """
    embedding = embedding_elements(parameters)
    size = embedding * run.width
    copies = int(run.tied) + int(run.passes > 1)
    last = (Term(copies * size, f"{copies} more gradients of the embedding, {embedding:,} x {run.width} B"),) * (copies > 0)
    output = Term(size, f"the output layer's gradient, {embedding:,} x {run.width} B")
    early = buffers if run.on_cuda else ()
    found = [
        Moment("the loss's backward", weights, carried, optimizer, (), "loss"),
        Moment("the last layer's backward", weights, carried, optimizer, (*early, output), "whole"),
        Moment("the end of the backward pass", weights, kept, optimizer, (*buffers, *last), "last"),
    ]
    if reduced is not None:
        left = max(0.0, 1 - filled(parameters) / elements(parameters))
        found.append(Moment("the first full bucket", weights, kept, optimizer, (*buffers, *reduced), "whole", left))
    return found


def _unsharded(run: Run, parameters: Sequence[Parameter]) -> list[Moment]:
    """Stage 0: plain AdamW in fp32, else FP16_UnfusedOptimizer."""
    p, width = elements(parameters), run.width
    half = width < _FP32
    weights = Term(p * width, f"{p:,} x {width} B")
    optimizer = Term(p * (_MOMENTS + _FP32 * half), f"{p:,} x {_MOMENTS + _FP32 * half} B (AdamW's moments{', fp32 weights' * half})")
    gradients = Term(p * width, f"{p:,} x {width} B")
    carried = gradients if run.passes > 1 else Term(0, "none yet")
    copied = width + run.communicated * (run.communicated > width)
    flat = min(p, FLATTENED + largest(parameters)) * copied
    reduction = (Term(flat, f"a flat copy of at most {FLATTENED:,} elements x {copied} B to reduce"),)
    if half:
        after = Moment("the update", weights, gradients, optimizer, (Term(p * _FP32, f"{p:,} fp32 gradients"),))
    else:
        after = Moment("the gradient's norm", weights, gradients, optimizer, norm_copy(run, parameters))
    return [
        *backward_moments(run, parameters, weights, optimizer, carried, gradients),
        Moment("the reduction of gradients", weights, gradients, optimizer, reduction),
        after,
    ]


def _bf16(run: Run, parameters: Sequence[Parameter]) -> list[Moment]:
    """Stage 1 in bf16: BF16_Optimizer holds fp32 gradients of the whole model all the time."""
    p, owned = elements(parameters), -(-elements(parameters) // run.shards)
    weights = Term(p * run.width, f"{p:,} x {run.width} B")
    optimizer = Term(owned * 12, f"{owned:,} x 12 B (AdamW's moments, fp32 weights)")
    standing = Term(p * _FP32, f"{p:,} x {_FP32} B")
    both = Term(p * (_FP32 + run.width), f"{p:,} x {_FP32 + run.width} B (fp32, and those of the last pass)")
    first, *rest = (elements(group) for group in groups(parameters))
    together = first + sum(rest) if first <= FLATTENED else max(first, *rest, 0)
    copied = _FP32 * (together > first) + run.communicated * (run.communicated < _FP32)
    reduction = (Term(together * copied, f"{together:,} x {copied} B, flat copies to reduce"),)
    return [
        *backward_moments(run, parameters, weights, optimizer, both if run.passes > 1 else standing, both),
        Moment("the reduction of gradients", weights, both, optimizer, reduction),
        *_gathered(run, parameters, weights, both, optimizer),
    ]


def _sharded(run: Run, parameters: Sequence[Parameter]) -> list[Moment]:
    """Stages 1 and 2 of DeepSpeedZeroOptimizer: gradients go through a bucket to the partition of their owner."""
    p, width = elements(parameters), run.width
    owned = -(-p // run.shards)
    wide = run.precision == "bf16"
    """Gradients are added up in fp32, in one flat buffer."""
    weights = Term(p * width, f"{p:,} x {width} B")
    optimizer = Term(0, "in host memory") if run.offloaded else Term(owned * 12, f"{owned:,} x 12 B (AdamW's moments, fp32 weights)")
    in_partition = owned if wide else touched(parameters, run.shards)
    of_rank = Term(in_partition * (_FP32 if wide else width), f"{in_partition:,} x {_FP32 if wide else width} B")
    if run.offloaded and not wide:
        of_rank = Term(0, "in host memory")
    whole_width = _FP32 if wide else width
    whole = Term(p * whole_width, f"{p:,} x {whole_width} B")
    bucket = filled(parameters)
    held = run.buffers * BUCKET if run.on_cuda else bucket
    staged = whole_width if run.stage == 1 else width
    buffer = Term(held * staged, f"reduce buckets, {held:,} x {staged} B")
    joined = wide or run.shards > 1
    """Else a bucket is one slice, and reduced where it is."""
    copied = staged * joined + (_FP32 if run.communicated > staged else 0)
    widest = largest(parameters) * _FP32 if wide else 0
    flat = Term(bucket * copied + widest, f"copies of a bucket to reduce, {bucket:,} x {copied} B" + f", and {widest:,} B of one in fp32" * wide)
    if run.offloaded:
        position = largest(parameters)
        held_back = Term(position * width, f"a buffer of the largest gradient, {position:,} x {width} B")
        buffers: tuple[Term, ...] = (buffer, held_back)
    else:
        buffers = (buffer,)
    normed = norm_copy(run, parameters) if run.offloaded else ()
    embedding = embedding_elements(parameters)
    waiting = Term((1 + run.tied) * embedding * width, f"{1 + run.tied} gradients of the embedding, {embedding:,} x {width} B")
    at_once = run.stage == 2 or run.on_cuda
    if at_once:
        carried = of_rank if run.passes > 1 and run.stage == 2 else whole if run.passes > 1 else Term(0, "none yet")
        kept = of_rank
        if run.stage == 2 and run.passes > 1 and not wide and not run.offloaded:
            kept = Term(2 * of_rank.bytes, f"{of_rank.words}, twice: this pass's and the sum")
        # the gradients that arrive fill the bucket, and what is in it goes to the partition
        found = [
            *backward_moments(run, parameters, weights, optimizer, carried, kept, buffers, (flat,)),
            Moment("the reduction of gradients", weights, kept, optimizer, (*buffers, flat, *normed, *((waiting,) if wide else ()))),
        ]
    else:
        carried = whole if run.passes > 1 else Term(0, "none yet")
        # what is in the bucket has left its own memory
        moving = Term(max(0, buffer.bytes - bucket * staged) + bucket * staged, f"{bucket:,} x {staged} B on their way into the partition")
        found = [
            *backward_moments(run, parameters, weights, optimizer, carried, whole),
            Moment("the reduction of gradients", weights, whole, optimizer, (moving, *buffers[1:], *normed)),
        ]
    if run.offloaded:
        return [*found, *_gathered(run, parameters, weights, Term(0, "in host memory"), optimizer)]
    found.append(Moment("the gradient's norm", weights, of_rank, optimizer, norm_copy(run, parameters)))
    copy = Term(0 if wide else owned * _FP32, "none" if wide else f"{owned:,} x {_FP32} B, flat for AdamW")
    if run.precision == "fp16":
        copy = Term(owned * (_FP32 + width), f"{owned:,} x {_FP32 + width} B, flat for AdamW")
    found.append(Moment("the update", weights, of_rank, optimizer, (copy,)))
    return [*found, *_gathered(run, parameters, weights, Term(0, "used up"), optimizer)]


def _gathered(run: Run, parameters: Sequence[Parameter], weights: Term, gradients: Term, optimizer: Term) -> list[Moment]:
    """The new weights come from their owners: in place on NCCL, through a copy on gloo."""
    if run.shards == 1 or run.on_cuda:
        return []
    size = max(elements(group) for group in groups(parameters))
    copy = Term(size * run.width, f"gloo's copy of {size:,} weights")
    return [Moment("the gathering of weights", weights, gradients, optimizer, (copy,))]


def embedding_elements(parameters: Sequence[Parameter]) -> int:
    """Elements of the embedding, whose gradient comes last."""
    return next(each for each in parameters if each.name.startswith("embedding")).elements


def largest(parameters: Sequence[Parameter]) -> int:
    """Elements of the largest parameter."""
    return max(each.elements for each in parameters)


def norm_copy(run: Run, parameters: Sequence[Parameter]) -> tuple[Term, ...]:
    """Norms are taken of an fp64 copy, one gradient at a time."""
    if run.stage == 0 and run.on_cuda:
        return ()
    size = largest(parameters)
    return (Term(size * _FP64, f"the largest gradient in fp64, {size:,} x {_FP64} B"),)
