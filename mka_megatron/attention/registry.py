"""The variants by name. A variant is one file and one entry here: nothing else asks which variant it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from mka_megatron.attention import fastmka, grouped, mka, mla
from mka_megatron.attention.inputs import Finish, RouteInputs
from mka_megatron.config.schema import Config, ModelConfig
from mka_megatron.memory import routing

__all__ = ["VARIANTS", "Finish", "RouteInputs", "Variant"]


@dataclass(frozen=True)
class Variant:
    """One way to attend, and what an adapter must build for it."""

    attend: Callable[..., Any]
    """The pure part, from projections to outputs [B, S, H, value channels]; its arguments follow `projection`:
    grouped.attend's (and result, with the routing weights or None), or mla.latent_attention's."""
    projection: Literal["grouped", "latent"]
    """grouped: one QKV projection to head groups; latent: low-rank projections with a shared rotary key."""
    kv_heads: Callable[[ModelConfig], int]
    """KV heads of the projection."""
    gated: bool = False
    """Routes over the memory levels."""
    attends_each_level: bool = False
    """One attention per level instead of one in all."""

    def levels(self, config: Config) -> int:
        """Memory levels it routes over; with one there is nothing to route: build no gate and pass no route."""
        return routing.levels(config.memory_hierarchy) if self.gated else 1


def _every_head(model: ModelConfig) -> int:
    return model.num_attention_heads


def _configured(model: ModelConfig) -> int:
    return model.num_kv_heads


VARIANTS: dict[str, Variant] = {
    "mha": Variant(grouped.attend, "grouped", _every_head),
    "mqa": Variant(grouped.attend, "grouped", lambda model: 1),
    "gqa": Variant(grouped.attend, "grouped", _configured),
    "mla": Variant(mla.latent_attention, "latent", _every_head),
    "mka": Variant(mka.attend, "grouped", _configured, gated=True, attends_each_level=True),
    "fastmka": Variant(fastmka.attend, "grouped", _configured, gated=True),
}
