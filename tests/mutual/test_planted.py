"""The planted case: a reward model that likes length, a policy that exploits it, and a policy that cannot improve."""

from __future__ import annotations

import pytest

from benchmarks.mutual_length import ARMS, BASE, KINDS, measured


@pytest.mark.parametrize("seed", [0, 1])
def test_length_controlled_pairs_and_the_m_step_reduce_the_bias(seed: int) -> None:
    found = {arm: measured(seed, iterations=3, **settings) for arm, settings in ARMS.items()}
    assert not any(one["stopped"] for one in found.values())
    # The best against the worst: the policy says what the reward model likes, as long as it can be.
    longest, at_first = KINDS[:, 1].max(), KINDS[:, 1].mean()
    assert found["best and worst"]["length"] > 0.98 * longest
    # Of the drift, the pairs leave less than half, and the M step less than the pairs alone.
    assert found["length-controlled"]["length"] - at_first < 0.5 * (longest - at_first)
    assert found["mutual"]["length"] < found["length-controlled"]["length"]
    # The weight of length against that of worth is more than halved, and worth is found all the same.
    assert found["mutual"]["bias"] < 0.5 * BASE[1] / BASE[0]
    assert found["mutual"]["worth"] > 3.5 > KINDS[:, 0].mean() + 1


def test_a_policy_that_cannot_improve_stays() -> None:
    for seed in range(5):
        found = measured(seed, iterations=3, rate=0.0, tau=0.6)
        assert found["stopped"].startswith("stopped at 1, win rate 0.") and found["stopped"].endswith("< tau 0.6")
        assert (found["worth"], found["length"]) == pytest.approx((2.0, 4.5)), "the first policy stays"
