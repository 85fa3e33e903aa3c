"""DeepSpeed in a process whose peers do not exist."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from deepspeed import comm
from deepspeed.runtime.zero import utils


@contextmanager
def unanswered() -> Iterator[None]:
    """ZeRO 3's checks that all ranks have the same lists as rank 0 still ask it, and take its answer for their own."""

    def same_length(numbers: list[int]) -> None:
        comm.broadcast(torch.tensor(len(numbers)), src=0, async_op=False)

    def of_rank_0(numbers: list[int]) -> list[int]:
        comm.broadcast(torch.tensor(numbers, dtype=torch.int64), src=0, async_op=False)
        return list(numbers)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(utils, "assert_lst_len_same_as_other_ranks", same_length))
        stack.enter_context(mock.patch.object(utils, "get_lst_from_rank0", of_rank_0))
        yield
