"""Slow ranks and spikes: found, said once, and not said of what is usual."""

from __future__ import annotations

import random
import time

import torch

from fusemega.monitoring.spikes import Spikes
from fusemega.monitoring.stragglers import RankTime, Slowest, Stragglers, slowest
from fusemega.runtime.forward_clock import ForwardClock


def _time(seconds: float, tokens: int = 100, stage: int = 0, waited: float = 0.0) -> RankTime:
    return RankTime("node", stage, seconds, waited, tokens)


def test_ranks_are_compared_by_token_and_within_their_stage() -> None:
    assert slowest([_time(1), _time(2, tokens=200)]) == Slowest(0, 1.0), "twice the tokens in twice the time"
    assert slowest([_time(1), _time(1), _time(9, stage=1), _time(12, stage=1)]) == Slowest(3, 12 / 9)
    assert slowest([_time(1), _time(5, stage=1)]) is None
    assert slowest([_time(1)]) is None


def test_a_rank_is_named_once_when_it_stays_slow() -> None:
    watch = Stragglers(1.3)
    usual, slow = [_time(1.0), _time(1.05), _time(1.0)], [_time(1.0), _time(1.0), _time(1.0, waited=0.5)]
    lines = [watch.compare(times)[1] for times in [slow, usual, slow, slow, slow, slow, usual, slow, slow, slow]]
    assert [line is not None for line in lines] == [False] * 4 + [True] + [False] * 4 + [True]
    assert lines[4] == (
        "rank 2 on node is slower than the other ranks of its pipeline stage: 1.50 times their median for a token, in "
        "3 comparisons in a row; 33% of that is waiting for its data"
    )


def test_the_clock_of_a_cpu_adds_up_forward_passes() -> None:
    clock = ForwardClock(torch.device("cpu"))
    with clock.forward(7):
        time.sleep(0.02)
    time.sleep(0.02)
    with clock.forward(5):
        pass
    clock.settle()
    seconds, tokens = clock.take()
    assert tokens == 12 and seconds >= 0.02
    assert clock.take() == (0.0, 0)


def test_spikes_are_said_once_each_and_usual_noise_is_not() -> None:
    chance = random.Random(1)
    falling = [5 * 0.99**i * chance.uniform(0.9, 1.1) for i in range(400)]
    watch = Spikes("lm loss", 10)
    assert [line for i, value in enumerate(falling) if (line := watch.see(i, value))] == []
    said = [watch.see(400 + i, value) for i, value in enumerate([4.0, 4.1, 0.1, float("nan"), 0.1])]
    assert [line is not None for line in said] == [True, False, False, True, False]
    assert str(said[0]).startswith("lm loss 4 at iteration 400, after a median of 0.1")
