"""What every layer's attention needs beside the hidden states, carried through Megatron's `packed_seq_params`."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from mka_megatron.memory.documents import Documents


@dataclass(kw_only=True)
class AttentionInputs(PackedSeqParams):
    """Document layout and rotary tables of one forward pass (no gradients flow into any of it).

    `qkv_format` stays "sbhd": the batch is rectangular, documents are spans of its rows.
    """

    qkv_format: str = "sbhd"
    documents: Documents
    cos: Tensor
    """[B,S,rotary_dim] fp32."""
    sin: Tensor
    """[B,S,rotary_dim] fp32."""
