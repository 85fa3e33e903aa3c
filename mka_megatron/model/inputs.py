"""What every layer's attention needs beside the hidden states, carried through Megatron's `packed_seq_params`."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.generation import Generation
from mka_megatron.memory.rows import Piece
from mka_megatron.memory.view import History, NoHistory
from mka_megatron.model.rope import RotaryTable


@dataclass(kw_only=True)
class AttentionInputs(PackedSeqParams):
    """Document layout, rotary tables and memory of one forward pass.

    `qkv_format` stays "sbhd": the batch is rectangular, documents are spans of its rows.
    """

    qkv_format: str = "sbhd"
    documents: Documents
    cos: Tensor
    """[B,S,rotary_dim] fp32."""
    sin: Tensor
    """[B,S,rotary_dim] fp32."""
    rope: RotaryTable
    """Tables at other positions."""
    chunks: Chunks | None
    """Chunks of the rows; None where the variant works on none."""
    history: History
    """What the layers see of the slots before those at hand."""


@dataclass(kw_only=True)
class GenerationInputs(PackedSeqParams):
    """The same of a pass over the next tokens of rows, which every layer goes through piece by piece."""

    qkv_format: str = "sbhd"
    rope: RotaryTable
    generation: Generation


def of_piece(piece: Piece, rope: RotaryTable) -> AttentionInputs:
    """Inputs of a piece's slots at hand; what lies before them the piece's view knows."""
    cos, sin = piece.documents.once(_tables, rope)
    return AttentionInputs(
        documents=piece.documents, cos=cos, sin=sin, rope=rope, chunks=piece.continued.chunks, history=NoHistory(),
    )


def _tables(documents: Documents, rope: RotaryTable) -> tuple[Tensor, Tensor]:
    return rope(documents.positions)
