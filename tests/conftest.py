"""Fixtures that several folders share."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest


@pytest.fixture(scope="session")
def topology():
    """A world of one rank, with Megatron's groups."""
    from mka_megatron.config.schema import ParallelConfig
    from mka_megatron.parallel import groups

    yield groups.initialize(ParallelConfig())
    groups.destroy()
