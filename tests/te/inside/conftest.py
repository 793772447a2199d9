"""The stand-in before anything else, and one process as a world of its own."""

from __future__ import annotations

from tests.te import stand_in

stand_in.install()

import pytest  # noqa: E402

from fusemega.runtime.parallel import ParallelConfig, World, initialize  # noqa: E402


@pytest.fixture
def world() -> World:
    """A world of this one process."""
    return initialize(ParallelConfig())
