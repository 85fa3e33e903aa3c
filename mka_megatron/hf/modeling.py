"""Qwen2, Qwen3 and Llama with memory levels: transformers' own models whose self-attention is ours.

`import mka_megatron.hf` makes AutoModelForCausalLM know them. No S x S mask is built: transformers returns a
four-dimensional mask as it is, so its models are given an empty one, and ours reads the documents from the caller's.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import (
    Cache,
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from mka_megatron.config.variants import needs_chunks
from mka_megatron.hf.attention import Inputs, MKAAttention
from mka_megatron.hf.configuration import MKALlamaConfig, MKAQwen2Config, MKAQwen3Config, run_config
from mka_megatron.hf.layout import Layout, documents_of, in_chunks
from mka_megatron.hf.route import Gate, Route
from mka_megatron.memory.chunks import Chunks


class _Initialized(PreTrainedModel):
    """First values of our tensors that a checkpoint lacks."""

    _can_compile_fullgraph = False
    _supports_flash_attn = False
    _supports_flex_attn = False

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Gate):
            module.initialize(self.config.initializer_range)
        elif isinstance(module, (Route, MKAAttention)):
            module.initialize()
        else:
            super()._init_weights(module)


class _Decoder(_Initialized):
    """A base model with our attention; precedes transformers' class."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        replace_attention(self)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        prompt_columns: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As transformers' own, with the differences of :func:`mka_megatron.hf.layout.documents_of`.

        Args:
            prompt_columns: columns of the prompt, at whose end the open chunk is closed; None: there is no such end.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        if kwargs.get("output_attentions") or self.config.output_attentions:
            raise ValueError("output_attentions is true: the attention never holds its weights; leave it out.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        inputs = self._inputs(inputs_embeds, attention_mask, position_ids, prompt_columns)
        return super().forward(
            attention_mask=inputs_embeds.new_empty(1, 1, 1, 0),
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            mka_inputs=inputs,
            **kwargs,
        )

    def _inputs(
        self, hidden: Tensor, mask: Tensor | dict[str, Tensor] | None, position_ids: Tensor | None,
        prompt_columns: int | None,
    ) -> Inputs:  # fmt: skip
        run = run_config(self.config)
        if isinstance(mask, dict):
            mask = mask["full_attention"]
        documents = documents_of(mask, position_ids, *hidden.shape[:2])
        size = run.memory_hierarchy.l1.chunk_size
        layout = in_chunks(documents, size, prompt_columns) if needs_chunks(run) else Layout(documents, None)
        layout = layout.to(hidden.device)
        documents = layout.documents
        positions = documents.positions[:1] if documents.whole_rows else documents.positions
        cos, sin = self.rotary_emb(hidden, positions)
        chunks = Chunks.of(documents, size) if needs_chunks(run) else None
        return Inputs(layout, chunks, cos, sin, self.rotary_emb)


class _CausalLM(_Initialized, GenerationMixin):
    """A language model over our base model; precedes transformers' class."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        adopt(self.model)
        replace_attention(self.model)
        self.post_init()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As transformers' own, with the code that loads the directory where this package is not installed."""
        super().save_pretrained(save_directory, **kwargs)
        if not self.is_remote_code() and kwargs.get("is_main_process", True):
            importlib.import_module("mka_megatron.hf.remote").write_remote_code(Path(save_directory))

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        model_kwargs["use_cache"] = False

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        # the first step follows the prompt
        model_kwargs.setdefault("prompt_columns", model_kwargs["attention_mask"].shape[1])
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)


class MKAQwen2Model(_Decoder, Qwen2Model):
    """Qwen2 and Qwen2.5 without a head."""

    config_class = MKAQwen2Config


class MKAQwen2ForCausalLM(_CausalLM, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""

    config_class = MKAQwen2Config


class MKAQwen3Model(_Decoder, Qwen3Model):
    """Qwen3 without a head."""

    config_class = MKAQwen3Config


class MKAQwen3ForCausalLM(_CausalLM, Qwen3ForCausalLM):
    """Qwen3."""

    config_class = MKAQwen3Config


class MKALlamaModel(_Decoder, LlamaModel):
    """Llama without a head."""

    config_class = MKALlamaConfig


class MKALlamaForCausalLM(_CausalLM, LlamaForCausalLM):
    """Llama 3."""

    config_class = MKALlamaConfig


OURS: dict[type, type] = {
    Qwen2Model: MKAQwen2Model,
    Qwen3Model: MKAQwen3Model,
    LlamaModel: MKALlamaModel,
    Qwen2ForCausalLM: MKAQwen2ForCausalLM,
    Qwen3ForCausalLM: MKAQwen3ForCausalLM,
    LlamaForCausalLM: MKALlamaForCausalLM,
}
"""transformers' classes -> ours."""


def adopt(model: PreTrainedModel) -> None:
    """Turn a model of transformers, whose config is already one of ours, into ours; its attention is left alone."""
    model.__class__ = OURS[type(model)]
    _CAN_RECORD_REGISTRY[model] = model._can_record_outputs  # by class: what output_hidden_states finds


def replace_attention(model: PreTrainedModel) -> None:
    """Our attention in every layer of a base model, on the projections that are there."""
    run = run_config(model.config)
    layers: Any = model.layers
    for layer in layers:
        layer.self_attn = MKAAttention(layer.self_attn, run).train(layer.training)
