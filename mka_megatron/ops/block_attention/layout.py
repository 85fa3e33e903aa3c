"""What a call of the block core works on: its sizes, and the runs of chunks that are one document's.

Host integers, and of the chunk table only: no shape depends on what the tokens are.
Shapes: B batch, S slots at hand, N chunks of the row, n chunks at hand, G KV heads, d channels, M pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from mka_megatron.ops.block_attention import ChunkTable, Recalled


@dataclass(frozen=True)
class Run:
    """Chunks at hand of one document, by their number in the row; those without tokens between them count in."""

    origin: int
    """The document's first chunk, which may lie before those at hand."""
    begin: int
    end: int


@dataclass(frozen=True)
class Layout:
    """Sizes of a call, checked against each other."""

    size: int
    """C."""
    first: int
    """Number of the first chunk at hand."""
    count: int
    """n."""
    halo: int
    """h."""
    window: int
    """w, in chunks."""
    scale: float

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        summaries: tuple[Tensor, Tensor] | None,
        recalled: Recalled | None,
        bias: Tensor | None,
        chunks: ChunkTable,
        window: int,
        scale: float,
    ) -> Layout:
        """The layout of these arguments of :func:`block_attention`; ValueError where shapes contradict each other."""
        batch, slots, heads, channels = q.shape
        size, first, count = chunks.size, chunks.first, chunks.count
        if window < size or window % size:
            raise ValueError(f"window is {window}: give a multiple of the chunk size {size}.")
        w = window // size
        halo = min(w - 1, first)
        groups = k.shape[2]
        # what each tensor must be, by name
        wanted = {
            "k": (k, (batch, halo * size + slots, groups, channels)),
            "v": (v, (batch, halo * size + slots, groups, channels)),
            "chunk lengths": (chunks.lengths, (batch, chunks.lengths.shape[1])),
            "chunk documents": (chunks.documents, tuple(chunks.lengths.shape)),
        }
        if summaries is not None:
            shape = (batch, summaries[0].shape[1], groups, channels)
            wanted |= {"summary k": (summaries[0], shape), "summary v": (summaries[1], shape)}
        if recalled is not None:
            pages, r = recalled.k.shape[2], recalled.index.shape[3]
            page = (batch, groups, pages, size if pages else recalled.k.shape[3], channels)
            wanted |= {
                "page k": (recalled.k, page),
                "page v": (recalled.v, page),
                "page lengths": (recalled.lengths, page[:3]),
                "index": (recalled.index, (batch, count, groups, r)),
            }
        if bias is not None:
            wanted["bias"] = (bias, (batch, slots, groups if bias.shape[2] != 1 else 1, 3))
        for name, (tensor, expected) in wanted.items():
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{name} has shape {list(tensor.shape)}: give {list(expected)}.")
        if heads % groups:
            raise ValueError(f"{heads} query heads over {groups} KV heads: H must be a multiple of G.")
        if count != -(-slots // size) or chunks.lengths.shape[1] < first + count:
            raise ValueError(
                f"{slots} slots are {-(-slots // size)} chunks of {size}; the table says {count} of them from number "
                f"{first} on, in rows of {chunks.lengths.shape[1]}."
            )
        if summaries is not None and summaries[0].shape[1] < first + count - w:
            raise ValueError(f"{summaries[0].shape[1]} summaries: give those of all {first + count} chunks.")
        return Layout(size, first, count, halo, w, scale)

    def runs(self, documents: Tensor) -> list[list[Run]]:
        """Per row of a [B, N] table of documents, its runs in order."""
        found = []
        for table in documents[:, : self.first + self.count].tolist():
            spans: dict[int, tuple[int, int]] = {}
            for chunk, document in enumerate(table):
                if document >= 0:
                    spans[document] = (spans.get(document, (chunk, 0))[0], chunk + 1)
            found.append([Run(o, max(o, self.first), end) for o, end in spans.values() if end > self.first])
        return found
