"""One process as a world of its own."""

from __future__ import annotations

import pytest

from fusemega.runtime.parallel import ParallelConfig, World, initialize


@pytest.fixture
def world() -> World:
    """A world of this one process."""
    return initialize(ParallelConfig())
