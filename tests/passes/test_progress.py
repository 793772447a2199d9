"""What a long pass says about itself."""

from __future__ import annotations

import pytest

from fusemega.passes.progress import progress
from fusemega.passes.score import _Counted
from fusemega.runtime import console


def test_a_log_has_a_line_every_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("fusemega.passes.progress.say", said.append)
    seconds = iter([0.0, 10.0, 40.0, 50.0, 80.0])
    assert not console.console().is_terminal
    with progress("teaching", 1000, lambda: next(seconds)) as advance:
        for count in (100, 300, 100, 500):
            advance(count)
    assert said == ["teaching: 40.0 % of 1,000 positions, 10/s, about 60 s left"]


def test_a_pass_is_told_micro_batch_by_micro_batch() -> None:
    told: list[int] = []
    counted = _Counted([{}, {}, {}], 100, told.append)
    chunks = [iter(counted), iter(counted)]  # as an interleaved schedule takes them
    for _ in range(3):
        for chunk in chunks:
            next(chunk)
    assert told == [33, 33]
    counted.finish()
    assert sum(told) == 100
