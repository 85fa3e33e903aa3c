"""A model of transformers, ours or not, as evaluation wants it (`mka_megatron.evaluation.language_model.LanguageModel`).

Shapes: B rows, T slots of a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from mka_megatron.config.errors import ConfigError

PREFILL_SLOTS = 1024
"""Slots of a forward pass."""


class HFModel:
    """A causal language model of transformers; its own generation settings are put aside.

    Args:
        model: on its device.
        cache: of models with memory levels, where their pages lie (`generate(cache_config=...)`).
        slots: of all rows together in a forward pass; memory for activations and logits grows with it.
    """

    def __init__(self, model: PreTrainedModel, slots: int = PREFILL_SLOTS, cache: dict[str, Any] | None = None) -> None:
        self._model: Any = model.eval()
        self._slots, self._cache = slots, cache
        self._ours = hasattr(model.config, "mka")
        self._model.generation_config = GenerationConfig()
        self.positions: int = model.config.max_position_embeddings

    @torch.no_grad()
    def nll(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """See LanguageModel."""
        longest, width = max(map(len, rows)) - 1, max(1, self._slots // len(rows))
        # what is padded on the right no token sees
        given = torch.tensor([[*row, *[0] * (longest + 1 - len(row))] for row in rows], device=self._model.device)
        cache = self._new_cache()
        # there is no prompt, so that no chunk is closed
        more = {"prompt_columns": 0} if self._ours else {}
        costs = []
        for begin in range(0, longest, width):
            piece = given[:, begin : begin + width + 1]
            logits = self._model(input_ids=piece[:, :-1], past_key_values=cache, use_cache=True, **more).logits
            costs.append(_costs(logits, piece[:, 1:]))
        every = torch.cat(costs, dim=1)
        return [cost[: len(row) - 1] for cost, row in zip(every, rows, strict=True)]

    @torch.no_grad()
    def greedy(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Collection[int] = (), at_least: int = 0
    ) -> list[list[int]]:
        """See LanguageModel; raises ConfigError where the model has too few positions."""
        longest, width = max(map(len, prompts)), max(1, self._slots // len(prompts))
        if longest + max_new_tokens - 1 > self.positions:
            raise ConfigError(f"the model has {self.positions} positions (max_position_embeddings), too few for {longest} "
                              f"tokens and {max_new_tokens} new ones; give a smaller length.")
        device = self._model.device
        tokens = torch.tensor([[*[0] * (longest - len(p)), *p] for p in prompts], device=device)
        mask = torch.tensor([[*[0] * (longest - len(p)), *[1] * len(p)] for p in prompts], device=device)
        made = self._model.generate(
            tokens, attention_mask=mask, past_key_values=self._new_cache(),
            generation_config=GenerationConfig(
                do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, min_new_tokens=at_least or None,
                eos_token_id=sorted(stop) or None, pad_token_id=0,
                prefill_chunk_size=width if longest > width else None,
            ),
        )  # fmt: skip
        continuations = []
        for row in made[:, longest:].tolist():
            end = next((i for i, token in enumerate(row) if token in stop), len(row))
            continuations.append(row[:end])
        return continuations

    def _new_cache(self) -> Any:
        if not self._ours:
            return DynamicCache(config=self._model.config)
        from mka_megatron.hf.cache import MKACache

        return MKACache(self._model.config, **(self._cache or {}))


def _costs(logits: Tensor, tokens: Tensor) -> Tensor:
    """logits [B, T, V], the tokens that follow [B, T] -> nats [B, T] float64 on the host."""
    logits = logits.float() if logits.dtype != torch.float64 else logits
    chosen = logits.gather(-1, tokens[..., None])[..., 0]
    return (logits.logsumexp(dim=-1) - chosen).double().cpu()
