"""Generate with the Megatron model: the prompts in pieces, then token by token, with what is remembered in between.

Shapes: B rows, T slots of a pass, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.schema import Config
from mka_megatron.config.variants import effective_kv_heads
from mka_megatron.inference.sampling import Sampling, choose
from mka_megatron.memory.generation import Generation
from mka_megatron.memory.tiers.store import TierStore
from mka_megatron.model.gpt import GPT
from mka_megatron.parallel.groups import Topology

PREFILL_SLOTS = 1024
"""Slots of a pass over prompts, of each row."""


@dataclass(frozen=True)
class Generated:
    """What :func:`generate` made."""

    tokens: list[list[int]]
    """New tokens of each row, the end-of-text token left out. The memory has not been given the last one of a row that
    did not end: the next prompt begins with it."""
    prompt_tokens: int
    prompt_seconds: float
    new_tokens: int
    """Chosen in passes over single tokens; the first one of each row comes out of the prompts."""
    new_seconds: float


def remember(
    model: GPT, config: Config, topology: Topology, batch: int, store: TierStore | None
) -> Generation:
    """An empty memory of `batch` rows for `model`; `store`: as Generation wants it."""
    heads = max(1, effective_kv_heads(config.attention.variant, config.model) // topology.tp_size)
    mine = range(topology.tp_rank * heads, (topology.tp_rank + 1) * heads)
    return Generation(
        config, layers=config.model.num_layers, heads=mine, batch=batch, device=topology.device, store=store
    )


@torch.no_grad()
def generate(
    model: GPT,
    memory: Generation,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int | None,
    positions: int,
    sampling: Sampling = Sampling(),  # noqa: B008
    prefill_slots: int = PREFILL_SLOTS,
    progress: Callable[[int, int], None] | None = None,
    stop: Collection[int] = (),
    at_least: int = 0,
) -> Generated:
    """Give every row its prompt, close its open chunk, and go on until its end or `max_new_tokens`.

    A collective call over the tensor-parallel ranks, which all choose the same tokens. Call it again with the same
    memory for the next turn.

    Args:
        model: in eval mode, without sequence parallelism.
        memory: of as many rows as there are prompts, from :func:`remember`.
        prompts: at least one token each.
        eos_id: ends a row; None: nothing does.
        positions: that the model has (model.max_position_embeddings).
        prefill_slots: slots of each row in a pass over the prompts; memory for activations grows with it.
        progress: called with (slots of the prompts done, all of them).
        stop: more tokens that end a row.
        at_least: new tokens of a row before which none of them is chosen.

    Raises:
        ConfigError: the model has no positions for so many tokens.
        ValueError: an empty prompt, or another number of them than the memory's rows.
        TierError: the page store is full or fails.
        RuntimeError: an error has ended an earlier pass over these rows; begin with :func:`remember` again.
    """
    if len(prompts) != len(memory.tokens) or not all(prompts):
        raise ValueError(
            f"{len(prompts)} prompts for {len(memory.tokens)} rows: give each row at least one token."
        )
    longest = max(before + len(prompt) for before, prompt in zip(memory.tokens, prompts, strict=True))
    if longest + max_new_tokens - 1 > positions:
        raise ConfigError(
            f"model.max_position_embeddings is {positions}, too few for {longest} tokens and {max_new_tokens} new ones; "
            "shorten the prompt, ask for fewer, or raise it."
        )
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    begun = _now(device)
    logits = _prefill(model, memory, prompts, prefill_slots, device, progress)
    memory.close_chunks()
    prompted = _now(device)
    made: list[list[int]] = [[] for _ in prompts]
    going, chosen_later = list(range(len(prompts))) if max_new_tokens else [], 0
    ends = {*stop, *(() if eos_id is None else (eos_id,))}
    while going:
        if len(made[going[0]]) < at_least:
            logits = logits.index_fill(-1, torch.tensor(sorted(ends), device=device), float("-inf"))
        chosen = _agreed(choose(logits, sampling, generator), model.pg_collection.tp)
        taken = chosen.tolist()
        for row in going:
            if taken[row] not in ends:
                made[row].append(taken[row])
        going = [row for row in going if taken[row] not in ends and len(made[row]) < max_new_tokens]
        if going:
            alive = None
            if len(going) < len(prompts):
                alive = torch.zeros(len(prompts), 1, dtype=torch.bool, device=device)
                alive[going] = True
            logits = model.extend(chosen[:, None], memory, alive, last=True)[:, 0]
            chosen_later += len(going)
    ended = _now(device)
    return Generated(made, sum(map(len, prompts)), prompted - begun, chosen_later, ended - prompted)


def _prefill(
    model: GPT, memory: Generation, prompts: Sequence[Sequence[int]], width: int, device: torch.device,
    progress: Callable[[int, int], None] | None,
) -> Tensor:  # fmt: skip
    """[B, V] logits after each prompt."""
    longest = max(map(len, prompts))
    logits: Tensor | None = None
    for begin in range(0, longest, width):
        parts = [prompt[begin : begin + width] for prompt in prompts]
        slots = max(map(len, parts))
        tokens = torch.tensor([[*part, *[0] * (slots - len(part))] for part in parts], device=device)
        counts = torch.tensor([len(part) for part in parts], device=device)
        valid = torch.arange(slots, device=device) < counts[:, None]
        found = model.extend(tokens, memory, None if bool(valid.all()) else valid, last=True)[:, 0]
        logits = found if logits is None else torch.where((counts > 0)[:, None], found, logits)
        if progress is not None:
            progress(min(begin + width, longest), longest)
    assert logits is not None
    return logits


def _agreed(tokens: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tokens of the group's first rank, on all of them: what they remember must not part."""
    if group.size() > 1:
        dist.broadcast(tokens, dist.get_process_group_ranks(group)[0], group=group)
    return tokens


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
