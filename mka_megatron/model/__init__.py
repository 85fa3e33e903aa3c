"""The Megatron-core GPT model with MKA attention."""
