"""The kernel under tensor parallelism: values and gradients are those of one dense head."""

from __future__ import annotations

import pytest

from tests.distributed.launch import run_ranks
from tests.distributed.workers.vocab import draws

TIED = [
    [10, 120, 230],
    [10, 120, 230, 350, 5, 399],
    [10, 120, 230, 350, 5, 399, 0, 1, 2],
    [10, 120, 230, 350, 5, 0],
    [10, 5, 0, 1, 2, 3, 4, 6, 7, 8],
]


@pytest.mark.parametrize("ranks", [2, 4])
def test_equals_the_dense_head(ranks: int) -> None:
    alone = draws(None)
    for found in run_ranks("vocab.py", ranks):
        assert found["collectives"] == 3 * 3, "three a chunk"
        assert found["errors"] and {n: e for n, e in found["errors"].items() if not e <= 1e-10} == {}
        assert [rows["ids"] for rows in found["top_k"]] == [[ids] * 3 for ids in TIED]
        for rows in found["top_k"]:
            assert rows["mass"] == pytest.approx([1.0] * 3, abs=1e-6)
            assert rows["label_gaps"] == pytest.approx([1.0, 2.0, 0.0], abs=1e-6)
        for drawn, wanted in zip(found["draws"], alone, strict=True):
            assert drawn["ids"] == wanted["ids"] and len({i for row in wanted["ids"] for i in row}) > 80
            assert drawn["label_logp"] == pytest.approx(wanted["label_logp"], abs=1e-12)
