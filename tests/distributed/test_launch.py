"""The helper that every multi-rank test trusts: a failing or silent rank must fail the test."""

from __future__ import annotations

import pytest

from tests.distributed.launch import run_ranks


def test_reports_come_back_in_rank_order() -> None:
    results = run_ranks("launcher_probe.py", 2, "--colour", "blue")
    assert [result["rank"] for result in results] == [0, 1]
    assert all(result["args"] == ["--colour", "blue"] and result["threads"] == "1" for result in results)


@pytest.mark.parametrize(("flag", "message"), [("--fail", "rank one gives up"), ("--mute", "no report from rank1")])
def test_a_failing_or_silent_rank_fails_the_test(flag: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run_ranks("launcher_probe.py", 2, flag)
