"""Qwen2, Qwen3 and Llama with memory levels in Hugging Face transformers; importing it registers the Auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mka_megatron.hf import modeling
from mka_megatron.hf.patch import patch_model

__all__ = ["patch_model"]

for _model, _causal_lm in (
    (modeling.MKAQwen2Model, modeling.MKAQwen2ForCausalLM),
    (modeling.MKAQwen3Model, modeling.MKAQwen3ForCausalLM),
    (modeling.MKALlamaModel, modeling.MKALlamaForCausalLM),
):
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    AutoModel.register(_model.config_class, _model)
    AutoModelForCausalLM.register(_model.config_class, _causal_lm)
