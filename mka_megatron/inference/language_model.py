"""The Megatron model as evaluation wants it (`mka_megatron.evaluation.language_model.LanguageModel`).

Shapes: B rows, T slots of a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from mka_megatron.config.schema import Config
from mka_megatron.inference.generate import PREFILL_SLOTS, generate, remember
from mka_megatron.memory.tiers.store import TierStore
from mka_megatron.model.gpt import GPT
from mka_megatron.parallel.groups import Topology


class MegatronModel:
    """A model on the tensor-parallel ranks of `topology`, all of which call it alike.

    Args:
        model: in eval mode, without sequence parallelism.
        config: of the model.
        store: the pages of what it recalls, from :func:`mka_megatron.memory.generation.open_pages`; the caller's to close.
        slots: of all rows together in a forward pass; memory for activations and logits grows with it.
    """

    def __init__(
        self, model: GPT, config: Config, topology: Topology, store: TierStore | None, slots: int = PREFILL_SLOTS
    ) -> None:
        self._model, self._config, self._topology, self._store = model, config, topology, store
        self._slots = slots
        self.positions = config.model.max_position_embeddings

    @torch.no_grad()
    def nll(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """See LanguageModel."""
        device, longest = self._topology.device, max(map(len, rows)) - 1
        width = max(1, self._slots // len(rows))
        memory = remember(self._model, self._config, self._topology, len(rows), self._store)
        found: list[list[Tensor]] = [[] for _ in rows]
        for begin in range(0, longest, width):
            parts = [row[begin : begin + width + 1] for row in rows]
            counts = [max(0, len(part) - 1) for part in parts]
            slots = max(counts)
            # [B, T + 1]
            given = torch.tensor([[*part, *[0] * (slots + 1 - len(part))] for part in parts], device=device)
            valid = torch.arange(slots, device=device) < torch.tensor(counts, device=device)[:, None]
            logits = self._model.extend(given[:, :-1], memory, None if bool(valid.all()) else valid)
            costs = token_costs(logits, given[:, 1:])
            for row, (cost, count) in enumerate(zip(costs, counts, strict=True)):
                found[row].append(cost[:count])
        memory.close()
        return [torch.cat(pieces) for pieces in found]

    def greedy(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Collection[int] = (), at_least: int = 0
    ) -> list[list[int]]:
        """See LanguageModel; raises ConfigError where the model has too few positions."""
        memory = remember(self._model, self._config, self._topology, len(prompts), self._store)
        made = generate(
            self._model, memory, prompts, max_new_tokens=max_new_tokens, eos_id=None, positions=self.positions,
            prefill_slots=max(1, self._slots // len(prompts)), stop=stop, at_least=at_least,
        )  # fmt: skip
        memory.close()
        return made.tokens


def token_costs(logits: Tensor, tokens: Tensor) -> Tensor:
    """logits [B, T, V], the tokens that follow [B, T] -> nats [B, T] float64 on the host."""
    logits = logits.float() if logits.dtype != torch.float64 else logits
    chosen = logits.gather(-1, tokens[..., None])[..., 0]
    return (logits.logsumexp(dim=-1) - chosen).double().cpu()
