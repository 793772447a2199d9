"""Mutual-Taught's rules against cases worked by hand, and what must hold whatever the numbers are."""

from __future__ import annotations

import math
import random

import pytest

from fusemega.errors import UserError
from fusemega.mutual.mixing import mixed_counts, sampled_down
from fusemega.mutual.pseudo_pairs import is_believed, kept_share, pseudo_pairs
from fusemega.mutual.splits import portion_sizes, split_keys
from fusemega.mutual.win_rate import Choice, choose, win_rate
from fusemega.selection.protocol import Candidate, CandidatePrompt, protocol_named
from fusemega.selection.protocols.mutual_taught import length_controlled_pair


def responses(*said: tuple[float, int]) -> list[Candidate]:
    """Responses of (reward, length)."""
    return [Candidate(i, "m", reward, None, length, i) for i, (reward, length) in enumerate(said)]


def numbers(pair: tuple[Candidate, Candidate] | None) -> list[int] | None:
    return None if pair is None else [one.text for one in pair]


@pytest.mark.parametrize(
    ("said", "chosen_and_rejected"),
    [
        # Mean 0.4: 0.5 and 0.9 are above it, and 0.5 is the shorter one.
        ([(0.9, 50), (0.5, 20), (0.1, 5), (0.1, 90)], [1, 2]),
        # The longest is the only one above the mean, 0.325.
        ([(1.0, 99), (0.1, 3), (0.1, 2), (0.1, 1)], [0, 1]),
        # One at the mean, 0.5, is not above it, though it is the shortest.
        ([(0.75, 9), (0.5, 1), (0.25, 4)], [0, 2]),
        # Equally short: the higher reward; then the first.
        ([(0.7, 5), (0.8, 5), (0.0, 1)], [1, 2]),
        ([(0.8, 5), (0.8, 5), (0.0, 1)], [0, 2]),
        # Equally low: the first.
        ([(0.1, 5), (0.1, 7), (0.4, 6)], [2, 0]),
        ([(-1.0, 5), (-3.0, 2)], [0, 1]),
        ([(0.5, 3)], None),
        ([(0.1, 3), (0.1, 2), (0.1, 1)], None),
        ([], None),
    ],
)
def test_the_length_controlled_pair(said: list[tuple[float, int]], chosen_and_rejected: list[int] | None) -> None:
    assert numbers(length_controlled_pair(responses(*said))) == chosen_and_rejected


def test_rewards_that_are_no_numbers_are_refused() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(UserError, match="rewards are finite numbers"):
            length_controlled_pair(responses((0.1, 1), (bad, 1)))
        with pytest.raises(UserError, match="a reward is a finite number"):
            pseudo_pairs({"a": bad}, {"a": 1.0})
        with pytest.raises(UserError, match="a reward is a finite number"):
            pseudo_pairs({"a": 1.0}, {"a": bad})
        with pytest.raises(UserError, match="a reward is a finite number"):
            win_rate([1.0], [bad])


def test_a_chosen_response_is_above_the_mean_and_no_longer_than_the_best() -> None:
    pairs = 0
    for seed in range(500):
        rng = random.Random(seed)
        said = responses(*((rng.randint(0, 9) / 7, rng.randint(1, 9)) for _ in range(rng.randint(1, 6))))
        found = length_controlled_pair(said)
        rewards = [one.reward or 0.0 for one in said]
        if found is None:
            assert len(set(rewards)) == 1
            continue
        pairs += 1
        chosen, rejected = found
        best = max(said, key=lambda one: one.reward or 0.0)
        assert chosen.reward is not None and chosen.reward >= sum(rewards) / len(said)
        assert rejected.reward == min(rewards) < chosen.reward and chosen.length <= best.length
    assert pairs > 300


def test_the_protocol_says_why_there_is_no_pair() -> None:
    kind = protocol_named("mutual_taught")
    protocol = kind(kind.Settings(name="mutual_taught"))
    found = protocol.offer(CandidatePrompt("k", tuple(responses((0.9, 50), (0.5, 20), (0.1, 5)))))
    assert found.preference is not None and [one.text for one in found.preference] == [0, 2]
    assert protocol.offer(CandidatePrompt("k", tuple(responses((0.9, 50))))).why == "fewer than two responses"
    assert protocol.offer(CandidatePrompt("k", tuple(responses((1, 5), (1, 2))))).why == "all rewards are equal"
    with pytest.raises(UserError, match=r"protocol.source: needed.*a, b"):
        protocol.check_sources(["a", "b"])


def test_the_win_rate_by_hand() -> None:
    found = win_rate([0.3, 0.1, 0.2, None, None, 0.5], [0.1, 0.1, 0.4, 0.0, None, None])
    assert (found.wins, found.ties, found.losses, found.prompts) == (2, 2, 2, 6)
    low, high = found.band()
    assert found.rate == 0.5 and 0 <= low < 0.5 < high <= 1
    everywhere = win_rate([1.0, 2.0], [0.0, 0.0])
    assert (everywhere.rate, *everywhere.band()) == (1.0, 1.0, 1.0)
    equal = win_rate([1.0], [1.0])
    assert (equal.rate, *equal.band(), equal.ties) == (0.5, 0.5, 0.5, 1)
    for wrong in ([], [1.0, 2.0]):
        with pytest.raises(UserError, match="are compared prompt by prompt"):
            win_rate(wrong, [1.0] if wrong else [])


def test_the_band_is_that_of_prompts_drawn_again() -> None:
    """Against a plain bootstrap, and the normal approximation: a share of 60 in 100 has a standard error of 0.049."""
    rng = random.Random(0)
    outcomes = [1.0] * 60 + [0.0] * 40
    found = win_rate(outcomes, [0.5] * 100)
    low, high = found.band(resamples=4000)
    drawn = sorted(sum(rng.choices(outcomes, k=100)) / 100 for _ in range(4000))
    assert found.rate == 0.6
    for edge, plain, normal in ((low, drawn[100], 0.6 - 0.096), (high, drawn[3900], 0.6 + 0.096)):
        assert abs(edge - plain) <= 0.0101 and abs(edge - normal) < 0.02
    assert found.band(resamples=4000) == (low, high), "seeded"


@pytest.mark.parametrize(
    ("rates", "tau", "checkpoint", "kept"),
    [
        ({50: 0.61, 100: 0.7, 150: 0.65}, 0.6, 100, True),
        ({50: 0.7, 100: 0.7}, 0.6, 50, True),  # the earlier of equal ones
        ({50: 0.6}, 0.6, 50, True),  # not below tau
        ({50: 0.5999, 100: 0.4}, 0.6, 50, False),
        ({50: 0.0}, 0.0, 50, True),
        ({50: 1.0}, 1.0, 50, True),
    ],
)
def test_which_checkpoint_is_kept(rates: dict[int, float], tau: float, checkpoint: int, kept: bool) -> None:
    choice = choose(rates, tau)
    assert (choice.checkpoint, choice.win_rate, choice.is_kept) == (checkpoint, rates[checkpoint], kept)


def test_what_a_choice_refuses_and_says() -> None:
    assert Choice(50, 0.52, 0.6).why_stopped(2) == "stopped at 2, win rate 0.5200 < tau 0.6"
    with pytest.raises(UserError, match="no checkpoint to choose from"):
        choose({}, 0.6)
    for tau in (-0.1, 1.1, math.nan):
        with pytest.raises(UserError, match="tau: .* is no share; allowed: 0 to 1"):
            choose({1: 0.5}, tau)


def test_pseudo_pairs_by_hand() -> None:
    """Old rewards 1, 3, 5: mean 3, deviation sqrt((4 + 0 + 4) / 3) = 1.633."""
    old = {"a": 1.0, "b": 3.0, "c": 5.0}
    found = pseudo_pairs({"a": 0.0, "b": 1.0, "c": 9.0, "d": 2.0}, old)
    assert found.differences == {"a": -1.0, "b": -2.0, "c": 4.0}
    assert found.epsilon == pytest.approx(math.sqrt(8 / 3))
    assert found.kept == ["a", "c"], "a is mildly negative, and stays"
    assert [kept_share(found.differences, eps) for eps in (0.0, 1.0, 1.5, 3.0)] == [1 / 3, 1 / 3, 2 / 3, 1.0]
    with pytest.raises(UserError, match="no prompt has a response of both policies"):
        pseudo_pairs({"a": 1.0}, {"b": 1.0})


def test_with_eps_0_a_tie_is_dropped() -> None:
    old = dict.fromkeys("abc", 0.1)  # 0.1 + 0.1 + 0.1 is not 0.3 in floating point
    found = pseudo_pairs({"a": 0.1, "b": 0.2, "c": 0.0}, old)
    assert found.epsilon == 0 and found.kept == ["b"]
    one = pseudo_pairs({"a": 0.1}, {"a": 0.3})
    assert one.epsilon == 0 and one.kept == []
    assert not is_believed(-0.5, 0.5) and is_believed(-0.4999, 0.5)


def test_the_filter_keeps_every_mildly_negative_pair() -> None:
    negative = 0
    for seed in range(200):
        rng = random.Random(seed)
        keys = [str(i) for i in range(rng.randint(1, 30))]
        old = {key: rng.gauss(0, 1) for key in keys}
        found = pseudo_pairs({key: rng.gauss(0.2, 1) for key in keys}, old)
        mean = sum(old.values()) / len(old)
        assert found.epsilon == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in old.values()) / len(old)))
        assert found.kept == [key for key in keys if found.differences[key] > -found.epsilon]
        negative += sum(found.differences[key] < 0 for key in found.kept)
    assert negative > 300


@pytest.mark.parametrize(
    ("pseudo", "ranked", "ratio", "counts"),
    [
        (100, 30, 1.0, (30, 30)),
        (30, 100, 1.0, (30, 30)),
        (7, 7, 1.0, (7, 7)),
        (100, 300, 2.0, (100, 200)),
        (100, 300, 0.5, (100, 50)),
        (9, 3, 1 / 3, (9, 3)),
        (5, 70, None, (5, 70)),
        (5, 70, 0, (5, 0)),
        (5, 0, 1.0, (5, 0)),
        (1, 100, 0.01, (1, 1)),
    ],
)
def test_the_larger_kind_is_sampled_down(
    pseudo: int, ranked: int, ratio: float | None, counts: tuple[int, int]
) -> None:
    assert mixed_counts(pseudo, ranked, ratio) == counts


def test_what_is_sampled_depends_on_the_seed_alone() -> None:
    keys = [str(i) for i in range(50)]
    found = sampled_down(keys, 10, seed=1)
    assert found == sampled_down(keys[::-1], 10, seed=1) == sampled_down(keys, 50, seed=1)[:10]
    assert len(set(found)) == 10 and found != sampled_down(keys, 10, seed=2)


def test_portions_by_hand() -> None:
    assert portion_sizes(62_000, policies=2, rewards=1, selection=2000) == {
        "selection": 2000,
        "policy-1": 20_000,
        "policy-2": 20_000,
        "reward-1": 20_000,
    }
    assert portion_sizes(20, 1, 0, selection=5) == {"selection": 5, "policy-1": 15}
    found = portion_sizes(30, 2, 1, selection=4, policy=5)
    assert found == {"selection": 4, "policy-1": 5, "policy-2": 5, "reward-1": 16}
    assert sum(portion_sizes(30, 2, 2, selection=4, policy=5, reward=3).values()) == 20, "the rest is in no portion"
    with pytest.raises(
        UserError, match=r"splits: 6 prompts, and the portions need 7 or more \(selection 4, policy-1 at"
    ):
        portion_sizes(6, 2, 1, selection=4)
    with pytest.raises(UserError, match=r"splits: 9 prompts, and the portions need 10 or more"):
        portion_sizes(9, 1, 1, selection=4, policy=3, reward=3)


def test_portions_are_disjoint_and_do_not_depend_on_the_order() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        keys = [f"key {i}" for i in range(rng.randint(20, 60))]
        sizes = portion_sizes(len(keys), rng.randint(1, 3), rng.randint(0, 3), rng.randint(1, 5))
        found = split_keys(keys, seed, sizes)
        everywhere = [key for portion in found.values() for key in portion]
        assert len(everywhere) == len(set(everywhere)) == len(keys)
        assert {name: len(portion) for name, portion in found.items()} == sizes
        rng.shuffle(keys)
        assert split_keys(keys, seed, sizes) == found
    assert split_keys(keys, 0, sizes) != split_keys(keys, 1, sizes)
