"""MKA-Megatron: long-context Qwen/Llama training with hierarchical-memory attention."""

__version__ = "0.1.0"
