"""The Megatron model of a configuration, ready for inference: a Hugging Face directory's, or a training checkpoint's."""

from __future__ import annotations

import dataclasses
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from mka_megatron.config.errors import refuse
from mka_megatron.config.schema import Config

if TYPE_CHECKING:
    from mka_megatron.data.tokenizer import Tokenizer
    from mka_megatron.model.gpt import GPT
    from mka_megatron.parallel.groups import Topology
    from mka_megatron.training.manifest import Checkpoint

_PLACES = ("placement", "hbm_pool_gib", "dram_pool_gib", "ssd_pool_gib", "when_full")
"""Keys of memory_hierarchy.l3 that say where pages lie and not what they hold."""


def for_inference(config: Config) -> Config:
    """One sequence on the tensor-parallel ranks: no replicas, no shards of it, nothing of training."""
    world, ranks = int(os.environ.get("WORLD_SIZE", 1)), config.parallel.tensor_parallel
    if world != ranks:
        raise refuse("parallel.tensor_parallel", ranks, f"{world} processes were started; start as many (torchrun "
                     f"--nproc_per_node={ranks}), or set it to {world}")  # fmt: skip
    parallel = dataclasses.replace(
        config.parallel, sequence_parallel=False, context_parallel=1, data_parallel=None
    )
    engine = dataclasses.replace(config.engine, zero_stage=0, offload_optimizer="none", offload_param="none")
    return dataclasses.replace(config, parallel=parallel, engine=engine)


def newest(config: Config) -> Checkpoint:
    """The checkpoint to take the weights from."""
    from mka_megatron.training.checkpoint import newest_intact

    found = newest_intact(config.training.output_dir)
    if found is None:
        raise refuse("training.output_dir", config.training.output_dir, "it holds no intact checkpoint; name the output of a "
                     "training, or a Hugging Face directory in model.init_from")  # fmt: skip
    return found


def of_checkpoint(config: Config, checkpoint: Checkpoint) -> Config:
    """The model that the checkpoint says, with the pages where `config` says."""
    from mka_megatron.config.typed import typed

    theirs = typed(checkpoint.body["config"], {(): str(checkpoint.path / "manifest.json")})
    mine = config.memory_hierarchy
    l3 = dataclasses.replace(theirs.memory_hierarchy.l3, **{name: getattr(mine.l3, name) for name in _PLACES})
    memory = dataclasses.replace(theirs.memory_hierarchy, l3=l3, ssd_spill_path=mine.ssd_spill_path)
    tokenizer = config.data.tokenizer or theirs.data.tokenizer
    return dataclasses.replace(
        config, model=theirs.model, attention=theirs.attention, routing=theirs.routing, memory_hierarchy=memory,
        data=dataclasses.replace(theirs.data, tokenizer=tokenizer),
    )  # fmt: skip


def tokenizer_path(config: Config, checkpoint: Checkpoint | None) -> Path:
    """Where the model's tokenizer is: a Hugging Face directory has its own, whatever a run has trained."""
    from mka_megatron.conversion.tokenizing import find_tokenizer

    if config.data.tokenizer is not None:
        return Path(config.data.tokenizer)
    own = None if checkpoint is not None or config.model.init_from is None else Path(config.model.init_from)
    if own is not None and (own / "tokenizer_config.json").is_file():
        return own
    found = find_tokenizer(config, checkpoint)
    if found is None:
        raise refuse(
            "data.tokenizer", "null", "the tokenizer of this model is not on this machine; name its directory"
        )
    return found.path


def built(config: Config, topology: Topology, tokenizer: Tokenizer, checkpoint: Checkpoint | None) -> GPT:
    """The model with its weights, to be used as it is."""
    from mka_megatron.model.build import build_model

    size = config.model.vocab_size or tokenizer.vocab_size
    if checkpoint is None:
        return build_model(config, topology, size).eval()
    from mka_megatron.conversion.loading import load_weights

    config = dataclasses.replace(config, model=dataclasses.replace(config.model, init_from=None))
    model = build_model(config, topology, size)
    load_weights(model, checkpoint, config, topology.tp_rank)
    return model.eval()


def name_of(topology: Topology) -> str:
    """Of this run's pages, the same on all ranks."""
    import torch.distributed as dist

    name = [f"generate-{uuid.uuid4().hex[:12]}"]
    dist.broadcast_object_list(name, src=0)
    return name[0]
