"""What one rank has in its node's memory besides its device's, and on the node's SSD."""

from __future__ import annotations

from collections.abc import Sequence

from mka_megatron.config.schema import Config, L3Config
from mka_megatron.config.variants import recalls
from mka_megatron.planning.activations import WIDTHS
from mka_megatron.planning.parameters import Parameter
from mka_megatron.planning.states import Run, Term, elements, groups, largest, touched
from mka_megatron.planning.steps import segments_per_step

_FP32 = 4
_GIB = 1 << 30
SUB_GROUP = 100_000_000
"""Elements of a group of states that NVMe offload reads at a time (training/deepspeed_config.py)."""
OPTIMIZER_BUFFERS, WEIGHT_BUFFERS = 4, 5
"""DeepSpeed's offload_optimizer.buffer_count and offload_param.buffer_count."""
_HEADER, _CHECKSUM, _LINE, _SECTOR = 128, 8, 64, 4096
"""Of a page (memory/tiers/pages.py): bytes before its contents and behind them, and what it is padded to in DRAM, on SSD."""

Named = tuple[str, Term]


def of_rank(config: Config, run: Run, parameters: Sequence[Parameter], tokens: int, tensor: int) -> tuple[list[Named], list[Named]]:
    """(in DRAM, on the SSD). `tokens`: slots of a forward pass; `tensor`: tensor-parallel ranks."""
    engine = config.engine
    dram: list[Named] = []
    ssd: list[Named] = []
    if engine.offload_optimizer == "cpu":
        dram.append(("offloaded optimizer", _optimizer(run, parameters)))
    elif engine.offload_optimizer == "nvme":
        inside, outside = _swapped_optimizer(run, parameters)
        dram.append(("offloaded optimizer", inside))
        ssd.append(("offloaded optimizer", outside))
    owned = _owned(run, parameters)
    if engine.offload_param == "cpu":
        shares = [[-(-each.elements // run.shards) * run.width for each in group] for group in groups(parameters)]
        pinned, words = [sum(group) for group in shares], f"{owned:,} x {run.width} B"
        if run.on_cuda:  # zero.Init pins every share before they are joined, and PyTorch keeps what it has pinned
            pinned, words = [*pinned, *(size for group in shares for size in group)], f"{words}, one by one and joined"
        dram.append(("offloaded weights", _with_pinned(run, 0, pinned, words)))
    elif engine.offload_param == "nvme":
        buffer = max(-(-largest(parameters) // run.shards), 1 << 18) + 1024
        size = WEIGHT_BUFFERS * buffer * run.width
        dram.append(("offloaded weights", Term(size, f"{WEIGHT_BUFFERS} buffers x {buffer:,} x {run.width} B")))
        ssd.append(("offloaded weights", Term(owned * run.width, f"{owned:,} x {run.width} B")))
    pages = _pages(config, tokens, tensor, run)
    if pages is not None:
        l3 = config.memory_hierarchy.l3
        budget = l3.dram_pool_gib
        pool = pages if budget is None else Term(min(pages.bytes, int(budget * _GIB)), f"at most {budget} GiB of {pages.words}")
        dram.append(("L3 pages", pool))
        if l3.placement == "ssd":
            ssd.append(("L3 pages", _spilled(pages, l3)))
    return dram, ssd


def _spilled(pages: Term, l3: L3Config) -> Term:
    """Of the pages, those that do not stay in the half of the DRAM pool that is never written (memory/tiers/paging.py)."""
    if l3.when_full == "evict" and l3.ssd_pool_gib is None:
        return Term(0, f"what is free, of {pages.words}: the oldest are forgotten")
    kept = int((l3.dram_pool_gib or 0) * _GIB) // 2
    spilled = Term(max(0, pages.bytes - kept), f"{pages.words}, less {kept:,} B that stay in DRAM")
    if l3.ssd_pool_gib is None:
        return spilled
    return Term(min(spilled.bytes, int(l3.ssd_pool_gib * _GIB)), f"at most {l3.ssd_pool_gib} GiB of {spilled.words}")


def _owned(run: Run, parameters: Sequence[Parameter]) -> int:
    if run.stage == 3:
        return sum(-(-each.elements // run.shards) for each in parameters)
    return -(-elements(parameters) // run.shards)


def _optimizer(run: Run, parameters: Sequence[Parameter]) -> Term:
    """States, fp32 weights and gradients, and what DeepSpeed keeps beside them."""
    owned = _owned(run, parameters)
    split = [sum(-(-each.elements // run.shards) for each in group) for group in groups(parameters)]
    if run.stage == 3:
        wide = 2 if run.precision == "fp16" else _FP32
        pinned = [size * _FP32 for size in split] + [owned * wide]
        words = f"{owned:,} x {16 + wide} B (moments, fp32 weights, gradients twice)"
        return _with_pinned(run, owned * 12, pinned, words)
    pinned = [size * each for size in split for each in (_FP32, _FP32, run.width)] + [largest(parameters) * run.width]
    words = (f"{owned:,} x {16 + run.width} B (moments, fp32 weights and gradients, the weights to hand back), "
             f"{largest(parameters):,} x {run.width} B")
    if run.passes > 1 and run.precision != "bf16":
        added = touched(parameters, run.shards)
        pinned.append(added * run.width)
        words += f", {added:,} x {run.width} B of gradients added up"
    return _with_pinned(run, owned * 8, pinned, words)


def _with_pinned(run: Run, plain: int, pinned: Sequence[int], words: str) -> Term:
    """PyTorch's allocator of pinned memory, which serves a GPU, rounds a buffer up to a power of two."""
    if not run.on_cuda:
        return Term(plain + sum(pinned), words)
    rounded = sum(1 << max(0, size - 1).bit_length() for size in pinned if size)
    return Term(plain + rounded, f"{words}; {sum(pinned):,} B of it pinned, which takes {rounded:,}")


def _swapped_optimizer(run: Run, parameters: Sequence[Parameter]) -> tuple[Term, Term]:
    """(buffers and gradients in DRAM, states on the SSD)."""
    owned = _owned(run, parameters)
    wide = 2 if run.precision == "fp16" else _FP32
    group = max(sum(-(-each.elements // run.shards) for each in group) for group in groups(parameters))
    buffer = min(group, SUB_GROUP + -(-largest(parameters) // run.shards))
    size = owned * wide + OPTIMIZER_BUFFERS * buffer * _FP32
    inside = Term(size, f"{owned:,} gradients x {wide} B and {OPTIMIZER_BUFFERS} buffers x {buffer:,} x {_FP32} B")
    return inside, Term(owned * 16, f"{owned:,} x 16 B (moments, fp32 weights, gradients)")


def saved_on_node(run: Run, parameters: Sequence[Parameter], ranks: int, writers: int) -> Term:
    """What `ranks` ranks keep of a checkpoint that is written while training goes on; `writers` of them write weights."""
    p, owned = elements(parameters), _owned(run, parameters)
    if run.stage == 0:
        each = run.width + 8 + _FP32 * (run.width < _FP32)
        return Term(writers * p * each, f"{writers} ranks x {p:,} x {each} B (weights and states)")
    weights = 0 if run.stage == 3 else writers * p * run.width
    return Term(weights + ranks * owned * 12, f"{ranks} ranks x {owned:,} x 12 B of states, and {weights:,} B of weights")


def _pages(config: Config, tokens: int, tensor: int, run: Run) -> Term | None:
    """L3's pages of the samples in progress: of one micro-batch where a step goes over whole samples."""
    training, memory, model = config.training, config.memory_hierarchy, config.model
    if training.segment_length is None or not recalls(config):
        return None
    width, chunk = WIDTHS[training.precision], memory.l1.chunk_size
    heads = max(1, model.num_kv_heads // tensor)
    passes = config.data.sequence_length // training.segment_length
    per_step = segments_per_step(config)
    samples = training.micro_batch_size * (1 if per_step == passes else max(1, run.passes // per_step))
    chunks = tokens // training.micro_batch_size * passes // chunk
    l3 = memory.l3
    signature = 8 * (l3.hash_tables * l3.hash_bits // 64 if l3.selection == "hash" else model.head_dim)
    used = _HEADER + signature + 2 * (chunk + 1) * model.head_dim * width + _CHECKSUM
    padded = _SECTOR if l3.placement == "ssd" else _LINE
    record = -(-used // padded) * padded
    pages = samples * model.num_layers * heads * chunks
    return Term(pages * record, f"{pages:,} pages of {samples} rows x {record:,} B")
