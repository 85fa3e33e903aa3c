"""Megatron-core's GPTModel, called with tokens, documents and labels."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mka_megatron.config.schema import Config
from mka_megatron.config.variants import needs_chunks
from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.generation import Generation
from mka_megatron.memory.view import History, NoHistory
from mka_megatron.model.core_attention import VariantCore
from mka_megatron.model.inputs import AttentionInputs, GenerationInputs
from mka_megatron.model.rope import RotaryTable
from mka_megatron.model.tiles import TokenLosses
from mka_megatron.parallel.context import RankHistory
from mka_megatron.parallel.exchange import Traffic
from mka_megatron.parallel.groups import Topology


class GPT(GPTModel):
    """A decoder whose layers rotate queries and keys themselves (`position_embedding_type="none"`)."""

    def __init__(self, run: Config, transformer: TransformerConfig, spec: TransformerBlockSubmodules,
                 rope: RotaryTable, topology: Topology, vocab_size: int, padded_vocab_size: int):
        super().__init__(
            config=transformer,
            transformer_layer_spec=spec,
            vocab_size=padded_vocab_size,
            max_sequence_length=run.model.max_position_embeddings,
            position_embedding_type="none",
            share_embeddings_and_output_weights=run.model.tie_embeddings,
            pg_collection=topology.groups,
        )
        self.real_vocab_size = vocab_size
        holder = self.embedding.word_embeddings if run.model.tie_embeddings else self.output_layer
        self.token_losses = TokenLosses(self.output_layer, holder, vocab_size, run.training.logits_tile)
        self.rope = rope
        self.traffic = [Traffic() for _ in range(run.model.num_layers)]
        """Bytes that each layer sent to other context-parallel ranks so far."""
        self.chunk_size = run.memory_hierarchy.l1.chunk_size if needs_chunks(run) else None

    def forward(self, tokens: Tensor, documents: Documents, labels: Tensor | None = None,
                history: History | None = None) -> Tensor:
        """Per-token loss, or logits where no labels are given.

        Args:
            tokens: [B,S] int64; S divisible by the tensor-parallel size under sequence parallelism.
            documents: layout of the batch.
            labels: [B,S] int64 next tokens, negative where there is no loss.
            history: what lies before `documents` where they are a segment of longer rows; None: nothing, or the
                shards of other context-parallel ranks.

        Returns:
            nll [B,S] fp32 in nats, 0 where the label is negative; without labels logits [B,S,vocab_size],
            gathered over tensor-parallel ranks.
        """
        cos, sin = self.rope(documents.positions)
        chunks = None if self.chunk_size is None else Chunks.of(documents, self.chunk_size)
        if history is None:
            ranks = self.pg_collection.cp
            history = NoHistory() if ranks.size() == 1 else RankHistory(ranks, documents, chunks, self.traffic)
        inputs = AttentionInputs(
            documents=documents, cos=cos, sin=sin, rope=self.rope, chunks=chunks, history=history,
        )
        hidden = self.embedding(input_ids=tokens, position_ids=documents.positions)
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=inputs)
        if labels is None:
            return self._logits(hidden)
        return self.token_losses(hidden, labels.clamp(min=0)).masked_fill(labels < 0, 0.0)

    @torch.no_grad()
    def extend(self, tokens: Tensor, generation: Generation, valid: Tensor | None = None, last: bool = False) -> Tensor:
        """Append tokens to rows that are being generated; not under sequence parallelism.

        Args:
            tokens: [B,T] int64.
            generation: what is remembered of the B rows, changed.
            valid: [B,T] bool, the slots that hold tokens; None: all.
            last: give the logits after each row's last token only (any, in a row without one).

        Returns:
            logits [B,T,vocab_size] ([B,1,vocab_size] for `last`), gathered over tensor-parallel ranks.
        """
        generation.begin(tokens.shape[1], valid)
        hidden = self.embedding(input_ids=tokens, position_ids=torch.zeros_like(tokens))
        hidden = self.decoder(
            hidden_states=hidden, attention_mask=None,
            packed_seq_params=GenerationInputs(rope=self.rope, generation=generation),
        )
        if last:
            slots = torch.arange(tokens.shape[1], device=tokens.device)
            ends = slots[-1:].expand(len(tokens)) if valid is None else torch.where(valid, slots, 0).amax(dim=1)
            # [T,B,h] -> [1,B,h]
            hidden = hidden[ends, torch.arange(len(tokens), device=tokens.device)][None]
        return self._logits(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        """[S/P,B,h] -> [B,S,vocab_size], gathered over tensor-parallel ranks."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden, weight=weight, runtime_gather_output=True)
        return logits.transpose(0, 1)[..., : self.real_vocab_size]

    def route_statistics(self) -> list[tuple[Tensor, Tensor]]:
        """Per gated layer, of the last forward: (mean share of each level [L], mean entropy in nats), detached."""
        cores = [module for module in self.modules() if isinstance(module, VariantCore)]
        return [core.statistics for core in cores if core.statistics is not None]

    def recall_distances(self) -> Tensor | None:
        """How many chunks back the block core's last forward recalled, [K] int64 over all layers; None without L3."""
        cores = [module for module in self.modules() if isinstance(module, VariantCore)]
        found = [core.recall_distances for core in cores if core.recall_distances is not None]
        return torch.cat(found) if found else None
