"""The variants by name. A variant is one file and one entry here: nothing else asks which variant it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from mka_megatron.attention import blockmka, fastmka, grouped, mka, mla
from mka_megatron.attention.inputs import Finish, RouteInputs
from mka_megatron.config.schema import Config, ModelConfig
from mka_megatron.config.variants import block_core
from mka_megatron.memory import routing

__all__ = ["VARIANTS", "Finish", "RouteInputs", "Variant"]


@dataclass(frozen=True)
class Variant:
    """One way to attend, and what an adapter must build for it."""

    attend: Callable[..., Any]
    """The pure part, from projections to outputs [B, S, H, value channels]; its arguments follow `projection`:
    grouped.attend's, whose result has the routing weights or None too (and, of the block core, the update of the
    memory), or mla.latent_attention's."""
    projection: Literal["grouped", "latent"]
    """grouped: one QKV projection to head groups; latent: low-rank projections with a shared rotary key."""
    kv_heads: Callable[[ModelConfig], int]
    """KV heads of the projection."""
    gated: bool = False
    """Routes over the memory levels."""
    attends_each_level: bool = False
    """One attention per level instead of one in all."""
    fuses: bool = True
    """Gated: mixes levels of its own beside those of the block core."""

    def levels(self, config: Config) -> int:
        """Levels that it fuses or mixes; with one there is nothing to route: no gate for it."""
        if not (self.gated and self.fuses):
            return 1
        memory = config.memory_hierarchy
        return 1 + int(memory.l2.enabled) if block_core(config) else routing.levels(memory)

    def core_levels(self, config: Config) -> int:
        """Levels under the one softmax of the block core; with one there is no bias to learn."""
        return routing.levels(config.memory_hierarchy) if self.gated and block_core(config) else 1


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
    "blockmka": Variant(blockmka.attend, "grouped", _configured, gated=True, fuses=False),
}
