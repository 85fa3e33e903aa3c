"""The command in segments: the same bits wherever the pages lie, after a kill, and on two tensor-parallel ranks."""

from __future__ import annotations

import os
import signal

import pytest

from tests.helpers.runs import Run, Workplace

PAGE_GIB = 4096 / 2**30  # what a page takes on the disk, at least
SEGMENTS = [
    "attention.variant=fastmka", "attention.core=block", "memory_hierarchy.l1.chunk_size=16",
    "memory_hierarchy.l1.window=32", "memory_hierarchy.l3.enabled=true", "memory_hierarchy.l3.recalled_chunks=2",
    "data.reset_at_documents=false", "data.sequence_length=512", "training.segment_length=64",
    "training.segments_per_step=2", "training.micro_batch_size=1", "training.global_batch_size=2",
    "training.steps=20", "training.warmup_steps=2", "training.eval_batches=1", "training.save_interval=3",
    "training.eval_interval=0", "logging.interval=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("segments"))


@pytest.fixture(scope="module")
def in_dram(workplace: Workplace) -> Run:
    return workplace.start("dram", *SEGMENTS).finish()


def on_ssd(workplace: Workplace, name: str) -> list[str]:
    """Overrides for a DRAM pool that holds a small part of the pages."""
    pages = 2 * 2 * 2 * 512 // 16  # samples, layers, heads, chunks
    return [*SEGMENTS, "memory_hierarchy.l3.placement=ssd", f"memory_hierarchy.l3.dram_pool_gib={pages // 4 * PAGE_GIB}",
            f"memory_hierarchy.ssd_spill_path={workplace.folder / name}"]  # fmt: skip


def test_the_losses_fall(in_dram: Run) -> None:
    losses = [float.fromhex(loss) for _, loss, _ in in_dram.losses()]
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])


def test_pages_on_the_ssd_change_no_bit(workplace: Workplace, in_dram: Run) -> None:
    run = workplace.start("ssd", *on_ssd(workplace, "pages")).finish()
    assert run.losses() == in_dram.losses()
    assert run.evaluations() == in_dram.evaluations()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.out / "tensorboard"))
    events.Reload()
    assert max(event.value for event in events.Scalars("tiers/evictions to ssd per step")) > 0
    assert max(event.value for event in events.Scalars("tiers/read bytes per step")) > 0
    assert not list((workplace.folder / "pages").rglob("*.pages")), "a finished run leaves no page"


def test_killed_in_the_middle_of_a_sample_it_goes_on_bit_for_bit(workplace: Workplace, in_dram: Run) -> None:
    """A sample takes 4 steps and checkpoints come every 3, so most hold samples in progress."""
    overrides = on_ssd(workplace, "killed")
    run = workplace.start("killed", *overrides)
    run.wait_for_step(7)
    os.kill(run.process.pid, signal.SIGKILL)
    run.wait()
    again = workplace.start("killed", *overrides).finish()
    assert "resumed from" in again.text()
    assert again.losses() == in_dram.losses()
    assert again.evaluations() == in_dram.evaluations()


def test_tensor_parallel_ranks_keep_their_own_heads(workplace: Workplace, in_dram: Run) -> None:
    overrides = on_ssd(workplace, "shared")
    run = workplace.start("tp", *overrides, "parallel.tensor_parallel=2", ranks=2).finish()
    for (_, one, _), (_, other, _) in zip(in_dram.losses(), run.losses(), strict=True):
        assert float.fromhex(other) == pytest.approx(float.fromhex(one), rel=1e-3)


def test_a_full_pool_ends_the_run_in_one_sentence(workplace: Workplace) -> None:
    run = workplace.start("full", *SEGMENTS, f"memory_hierarchy.l3.dram_pool_gib={64 * PAGE_GIB}")
    assert run.wait() == 1
    assert "memory_hierarchy.l3.dram_pool_gib" in run.text()
    assert "Traceback" not in run.text()
