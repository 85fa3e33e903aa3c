"""The attention variants as pure functions of tensors: no Megatron, no Hugging Face here."""
