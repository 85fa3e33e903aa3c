"""What the loop takes for the loss of another rank."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from mka_megatron.training.checkpoint import CheckpointError
from mka_megatron.training.loop import _connection_lost

_CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711"


@pytest.mark.parametrize("error", [RuntimeError(_CLOSED), dist.DistBackendError("NCCL error: remote process exited"), dist.DistNetworkError("reset")])
def test_a_connection_that_broke(error: RuntimeError) -> None:
    assert _connection_lost(error)


def test_a_sentence_of_ours_that_names_such_a_folder_is_told_as_it_is() -> None:
    assert not _connection_lost(CheckpointError("checkpoint /data/gloo/run/checkpoints/step-00000004 is not intact: it is damaged."))
    assert not _connection_lost(RuntimeError("shape mismatch"))
