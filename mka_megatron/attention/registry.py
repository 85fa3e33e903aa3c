"""The variants by name. A variant is one file and one entry here: nothing else asks which variant it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from mka_megatron.attention import fastmka, grouped
from mka_megatron.attention.inputs import Finish, RouteInputs
from mka_megatron.config.schema import Config, ModelConfig
from mka_megatron.memory.documents import Documents


class Attend(Protocol):
    """The pure part of a variant: raw projections to attention output, [B, S, H, value channels], and the
    routing weights for monitoring (None without a route)."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        finish: Finish,
        route: RouteInputs | None,
        documents: Documents,
        scale: float,
        config: Config,
    ) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True)
class Variant:
    """One way to attend, and what an adapter must build for it."""

    attend: Attend
    """The computation."""
    kv_heads: Callable[[ModelConfig], int]
    """KV heads of the projection."""
    gated: bool
    """Takes a route: build a gate, a blend and decays if there is more than one level to route over."""
    projection: Literal["grouped", "latent"]
    """grouped: one QKV projection per head group; latent: low-rank projections with a shared rotary key."""


VARIANTS: dict[str, Variant] = {
    "mha": Variant(grouped.attend, lambda model: model.num_attention_heads, False, "grouped"),
    "mqa": Variant(grouped.attend, lambda model: 1, False, "grouped"),
    "gqa": Variant(grouped.attend, lambda model: model.num_kv_heads, False, "grouped"),
    "fastmka": Variant(fastmka.attend, lambda model: model.num_kv_heads, True, "grouped"),
}
