"""transformers' cache over memory.generation: what the layers remember of rows that are being generated.

transformers counts columns, padding included; the memory counts tokens. Rows are reordered, repeated and given up for
all layers at once.
"""

from __future__ import annotations

import dataclasses
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.schema import Config
from mka_megatron.hf.configuration import run_config
from mka_megatron.memory.generation import Generation, open_pages
from mka_megatron.memory.rows import Piece


class MKACache(Cache):
    """Rows that begin empty; their number, dtype and device are those of the first pass.

    Args:
        config: of the model.
        dram_gib: budget of the recalled chunks' pages in host memory; None: no limit.
        ssd_path: directory for what exceeds it; None: nothing may.
        device_gib: budget of the hot pages kept on the device.

    Raises ConfigError for a directory without a budget, and at the first pass where the tiers cannot be used so.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        dram_gib: float | None = None,
        ssd_path: str | Path | None = None,
        device_gib: float = 0.0,
    ) -> None:
        super().__init__(layers=[MKALayer(self) for _ in range(config.num_hidden_layers)])
        self._config = _placed(run_config(config), dram_gib, ssd_path, device_gib)
        self._memory: Generation | None = None
        self._close: Callable[[], object] = _nothing
        self._in_prompt = True
        self.columns = 0
        """Of every row so far, padding included."""

    def begin(self, hidden: Tensor, valid: Tensor | None, prompt_columns: int | None) -> list[Piece]:
        """The next pass, over `hidden` [B, T, h], of which `valid` [B, T] bool hold tokens (None: all).

        A prompt's open chunk is closed before the token that follows it: at `prompt_columns` where that is known,
        else before the first pass of one column after others.

        Raises ValueError for another number of rows than the cache has.
        """
        batch, columns = hidden.shape[:2]
        memory = self._begun(batch, hidden)
        ends = columns == 1 and self._in_prompt if prompt_columns is None else self.columns == prompt_columns
        if ends and self.columns:
            memory.close_chunks()
        self._in_prompt = columns > 1 or not self.columns
        self.columns += columns
        return memory.begin(columns, valid)

    @property
    def memory(self) -> Generation:
        """Of the rows that have begun."""
        assert self._memory is not None
        return self._memory

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first pass."""
        return -1 if self._memory is None else len(self._memory.tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from row beam_idx[i]."""
        if self._memory is not None:
            self._memory.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.reorder_cache(torch.arange(self.batch_size)[indices.cpu()])

    def reset(self) -> None:
        """Forget everything."""
        self._close()
        self._memory, self._close, self._in_prompt, self.columns = None, _nothing, True, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing can be taken back; raises ValueError but for 0."""
        if tokens_to_remove:
            _refuse("cannot forget its last tokens: their summaries are not kept; begin a new one")

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        _refuse("cannot be copied, its pages may lie on a disk: give every generation its own")

    def _begun(self, batch: int, hidden: Tensor) -> Generation:
        if self._memory is None:
            run = f"generate-{uuid.uuid4().hex[:12]}"
            store = open_pages(self._config, hidden.dtype, hidden.device, run=run)
            if store is not None:
                self._close = weakref.finalize(self, store.close)
            model = self._config.model
            self._memory = Generation(
                self._config, layers=model.num_layers, heads=range(model.num_kv_heads), batch=batch,
                device=hidden.device, store=store,
            )  # fmt: skip
        if len(self._memory.tokens) != batch:
            raise ValueError(f"the input has {batch} rows, the cache {len(self._memory.tokens)}: give as many.")
        return self._memory


class MKALayer(DynamicLayer):
    """What transformers asks a layer of an MKACache."""

    is_croppable = False

    def __init__(self, cache: MKACache) -> None:
        super().__init__()
        self._cache = weakref.ref(cache)
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Columns so far."""
        cache = self._cache()
        return 0 if cache is None else cache.columns

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Keys and values come in through the model's own attention."""
        _refuse("belongs to models with mka_megatron's attention: give other models their own")


def adopted(cache: Cache | None, config: PreTrainedConfig) -> MKACache:
    """`cache` as ours: an empty DynamicCache becomes one where it stands; None: a new one.

    Raises ValueError for a cache of another kind, or one that holds something.
    """
    if cache is None:
        return MKACache(config)
    if type(cache) is DynamicCache and cache.get_seq_length() == 0 and not cache.offloading:
        cache.__class__ = MKACache  # type: ignore[assignment]
        MKACache.__init__(cache, config)  # type: ignore[arg-type]
    if not isinstance(cache, MKACache):
        raise ValueError(f"past_key_values is a {type(cache).__name__}: models with memory levels need an MKACache, or an "
                         "empty DynamicCache, which becomes one.")
    return cache


def _placed(config: Config, dram_gib: float | None, ssd_path: str | Path | None, device_gib: float) -> Config:
    if ssd_path is not None and dram_gib is None:
        raise ConfigError(f"ssd_path is {ssd_path}: nothing would reach the disk while host memory has no limit; give "
                          "dram_gib too.")
    memory = config.memory_hierarchy
    l3 = dataclasses.replace(
        memory.l3, dram_pool_gib=dram_gib, hbm_pool_gib=device_gib, placement="dram" if ssd_path is None else "ssd"
    )
    path = None if ssd_path is None else str(ssd_path)
    return dataclasses.replace(config, memory_hierarchy=dataclasses.replace(memory, l3=l3, ssd_spill_path=path))


def _nothing() -> None:
    pass


def _refuse(what: str) -> NoReturn:
    raise ValueError(f"an MKACache {what}.")
