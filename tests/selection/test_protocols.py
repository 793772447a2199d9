"""The protocols: cases worked by hand, and what holds for any responses."""

from __future__ import annotations

import random
from typing import Any

import pytest

from fusemega.errors import UserError
from fusemega.selection import protocols  # noqa: F401  (registers them)
from fusemega.selection.protocol import (
    Candidate,
    CandidatePrompt,
    Offer,
    Protocol,
    divide,
    parse_protocol,
    protocol_named,
)
from tests.selection.make import prompt


def protocol(name: str, **settings: Any) -> Protocol:
    return protocol_named(name)(parse_protocol({"name": name, **settings}))


def numbers(candidates: tuple[Candidate, ...] | None) -> list[int] | None:
    return None if candidates is None else [candidate.text for candidate in candidates]


# Each case: responses (source, reward, correct), then the numbers of the SFT response and of the pair, and the rule.
INSTRUCTION: dict[str, Any] = {
    # a has 0.05, b 0.09: the larger one that is inside; the best of all is c's, which has no pair.
    "largest margin inside": ([("a", 0.10), ("a", 0.15), ("b", 0.01), ("b", 0.10), ("c", 0.5)], [4], [3, 2], ""),
    # b's 0.4 is larger, and outside.
    "outside is no pair": ([("a", 0.10), ("a", 0.15), ("b", 0.1), ("b", 0.5)], [3], [1, 0], ""),
    # 0.15 - 0.14 and 0.8 - 0.7 are 0.01 and 0.1 on paper, and not in floating point: the bounds are inside.
    "lower bound": ([("a", 0.14), ("a", 0.15)], [1], [1, 0], ""),
    "upper bound": ([("a", 0.7), ("a", 0.8)], [1], [1, 0], ""),
    # Best and worst are 0.2 apart; the pair in the middle, which would be inside, is not taken.
    "extremes alone": ([("a", 0.1), ("a", 0.2), ("a", 0.3)], None, None, "no pair in the window 0.01 to 0.1"),
    "one response a source": ([("a", 0.1), ("b", 0.15)], None, None, "no pair in the window 0.01 to 0.1"),
    "equal rewards": ([("a", 0.1), ("a", 0.1)], None, None, "no pair in the window 0.01 to 0.1"),
    "ties: the first": ([("a", 0.2), ("a", 0.2), ("a", 0.15), ("a", 0.15)], [0], [0, 2], ""),
}


@pytest.mark.parametrize("name", INSTRUCTION)
def test_fusechat3_instruction(name: str) -> None:
    responses, sft, pair, why = INSTRUCTION[name]
    found = protocol("fusechat3").offer(prompt(*responses))
    assert (numbers(found.sft), numbers(found.preference), found.why) == (sft, pair, why)


VERIFIED: dict[str, Any] = {
    # The best reward of all is incorrect.
    "correct before reward": ("maths", [("a", 0.2, True), ("a", 0.15, False), ("b", 0.9, False)], [0], [0, 1], ""),
    "highest correct, lowest incorrect": (
        "maths",
        [("a", 0.20, True), ("a", 0.22, True), ("a", 0.15, False), ("a", 0.14, False)],
        [1],
        [1, 3],
        "",
    ),
    "incorrect is better": (
        "maths",
        [("a", 0.2, True), ("a", 0.25, False)],
        [0],
        None,
        "no pair in the window 0.01 to 0.1",
    ),
    "never over sources": (
        "maths",
        [("a", 0.2, True), ("b", 0.15, False)],
        [0],
        None,
        "no source has both kinds of response",
    ),
    "maths without a correct one": (
        "maths",
        [("a", 0.2, False), ("a", 0.1, None)],
        None,
        None,
        "no response is correct",
    ),
    "undecided is neither": (
        "maths",
        [("a", 0.2, True), ("a", 0.15, None)],
        [0],
        None,
        "no source has both kinds of response",
    ),
    # No window: any margin, also a negative one; of several sources the largest.
    "code has no window": (
        "code",
        [("a", 0.9, True), ("a", 0.1, False), ("b", 0.5, True), ("b", 0.1, False)],
        [0],
        [0, 1],
        "",
    ),
    "code below": ("code", [("a", 0.1, True), ("a", 0.9, False)], [0], [0, 1], ""),
    "code: all fail": ("code", [("a", 0.1, False), ("b", 0.9, False)], None, None, "every response fails"),
}


@pytest.mark.parametrize("name", VERIFIED)
def test_fusechat3_maths_and_code(name: str) -> None:
    domain, responses, sft, pair, why = VERIFIED[name]
    found = protocol("fusechat3").offer(prompt(*responses, domain=domain))
    assert (numbers(found.sft), numbers(found.preference), found.why) == (sft, pair, why)


def test_fusechat3_settings() -> None:
    wide = prompt(("a", 0.1), ("a", 0.5))
    assert numbers(protocol("fusechat3", max_margin=None).offer(wide).preference) == [1, 0]
    assert numbers(protocol("fusechat3", without_pair="sft").offer(wide).sft) == [1]
    code = prompt(("a", 0.9, True), ("a", 0.1, False), domain="code")
    assert protocol("fusechat3", code_window=True).offer(code).preference is None
    maths = prompt(("a", 0.2, True), ("a", 0.15, False), domain="math")
    assert numbers(protocol("fusechat3", domains={"math": "maths"}).offer(maths).preference) == [0, 1]
    assert numbers(protocol("fusechat3").offer(prompt(("a", 0.2), ("b", 0.9), domain="chinese")).sft) == [1]
    single = CandidatePrompt("k", (Candidate(7, "a"),), "chinese")
    assert numbers(protocol("fusechat3").offer(single).sft) == [7]  # a single response needs no reward


def test_wrpo() -> None:
    found = prompt(("a", 0.3), ("b", 0.5), ("target", 0.9), ("target", 0.2), ("target", 0.4))
    first = protocol("wrpo").offer(found)
    assert (numbers(first.sft), first.preference, first.left) == ([2], None, True)
    second = protocol("wrpo", target="target")
    assert numbers(second.offer(found).preference) == [1, 2, 3]  # the order of the objective: ws, wt, l
    assert second.offer(prompt(("a", 0.3))).why == "no response of the target"
    assert second.offer(prompt(("target", 0.3), ("target", 0.1))).why == "no response of a source"
    assert second.offer(prompt(("a", 0.3), ("target", 0.1))).why == "the target's rewards are all equal"


def test_fuserl() -> None:
    found = prompt(("a", 0.1), ("a", 0.3), ("b", 0.2), ("b", 0.2), ("c", 0.9))
    offer = protocol("fuserl").offer(found)
    # The best of each source; then all of the sources with two different rewards.
    assert (numbers(offer.sft), numbers(offer.preference)) == ([1, 2, 4], [0, 1])
    assert numbers(protocol("fuserl", top_k_responses=2).offer(found).sft) == [4, 1]
    one = protocol("fuserl").offer(prompt(("a", 0.1), ("a", 0.3)))
    assert (one.sft, numbers(one.preference)) == (None, [0, 1])  # one response is no group


def test_simpo() -> None:
    found = prompt(("a", 0.1), ("a", 0.3), ("a", 0.2))
    assert numbers(protocol("simpo").offer(found).preference) == [1, 0]
    same = CandidatePrompt("k", tuple(candidate._replace(same=1) for candidate in found.candidates))
    assert protocol("simpo").offer(same).why == "all samples are the same"
    assert protocol("simpo").offer(prompt(("a", 0.1), ("a", 0.1))).why == "all rewards are equal"
    with pytest.raises(UserError, match=r"protocol.source: needed.*a, b"):
        protocol("simpo").check_sources(["a", "b"])


def test_pairs_are_of_one_source_and_inside_the_window() -> None:
    """Whatever the rewards are; and no source has a larger margin that is inside."""
    kept = 0
    for seed in range(300):
        rng = random.Random(seed)
        low, high = sorted(rng.sample(range(0, 60, 5), 2))
        chooser = protocol("fusechat3", min_margin=low / 100, max_margin=high / 100 or None)
        for _ in range(20):
            domain = rng.choice(["instruction", "maths"])
            said: list[Any] = [
                (rng.choice("abc"), rng.randint(0, 50) / 100, rng.choice([True, False, None]))
                for _ in range(rng.randint(1, 9))
            ]
            found = chooser.offer(prompt(*said, domain=domain))
            if found.preference is None:
                continue
            kept += 1
            chosen, rejected = found.preference
            assert chosen.source == rejected.source
            hundredths = round(100 * (said[chosen.text][1] - said[rejected.text][1]))
            assert low <= hundredths <= high
            if domain == "maths":
                assert said[chosen.text][2] is True and said[rejected.text][2] is False
                continue
            for source in "abc":
                rewards = [round(100 * each[1]) for each in said if each[0] == source]
                spread = max(rewards, default=0) - min(rewards, default=0)
                assert spread <= hundredths or spread > high
    assert kept > 500


def test_the_division_is_by_key_alone() -> None:
    """Disjoint, complete, of the asked share, the same in any order; other pools change nothing."""
    one = (Candidate(0, "a"),)
    for seed in range(100):
        rng = random.Random(seed)
        kinds = [Offer(sft=one, preference=one + one), Offer(sft=one), Offer(preference=one + one), Offer(why="no")]
        share = rng.choice([0.0, 0.25, 1 / 3, 0.4, 1.0])
        weights = rng.choice([(1, 0, 0, 0), (4, 1, 0, 1), (2, 1, 1, 1)])
        members = [(f"{seed}-{i}", "pool", rng.choices(kinds, weights)[0]) for i in range(rng.randint(1, 60))]
        found = divide(members, seed, share)
        shuffled = rng.sample(members, len(members))
        assert divide(shuffled, seed, share) == found
        others = [(f"other {key}", "elsewhere", offer) for key, _, offer in members]
        assert {key: to for key, to in divide(others + shuffled, seed, share).items() if key in found} == found
        assert found.keys() == {key for key, _, offer in members if not offer.is_nothing}
        for key, _, offer in members:
            assert key not in found or getattr(offer, found[key]) is not None
        if weights == (1, 0, 0, 0):
            wanted = int(share * len(members) + 1e-9)
            assert list(found.values()).count("sft") == wanted


def test_published_shares() -> None:
    """floor(0.4 n) are the SFT rows of FuseChat-3.0's instruction sets."""
    both = Offer(sft=(Candidate(0, "a"),), preference=(Candidate(0, "a"), Candidate(1, "a")))
    for total, sft in ((51_098, 20_439), (20_374, 8_149), (9_435, 3_774)):
        found = divide(((str(i), "p", both) for i in range(total)), 0, 0.4)
        assert list(found.values()).count("sft") == sft
    third = divide(((str(i), "p", Offer(sft=both.sft, left=True)) for i in range(9)), 0, 1 / 3)
    assert sorted(third.values()) == ["left"] * 6 + ["sft"] * 3
    # Another seed divides differently.
    members = [(str(i), "p", both) for i in range(50)]
    assert divide(members, 0, 0.4) != divide(members, 1, 0.4)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"protocol.name: unknown name 'fusechat' \(did you mean 'fusechat3'"):
        parse_protocol({"name": "fusechat"})
    with pytest.raises(UserError, match=r"protocol.min_margn: unknown key \(did you mean 'min_margin'"):
        parse_protocol({"name": "fusechat3", "min_margn": 1})
    with pytest.raises(UserError, match="max_margin 0.1 is less than min_margin 0.5"):
        parse_protocol({"name": "fusechat3", "min_margin": 0.5})
    with pytest.raises(UserError, match=r"f:1: domain 'math' \(did you mean 'maths'.*protocol.domains"):
        protocol("fusechat3").offer(prompt(("a", 0.1), domain="math"))
    with pytest.raises(UserError, match="f:1: the row is of domain code.*`fusemega verify`"):
        protocol("fusechat3").offer(prompt(("a", 0.1), ("a", 0.2), domain="code"))
    with pytest.raises(UserError, match="f:1: a response has no reward"):
        protocol("simpo").offer(CandidatePrompt("k", (Candidate(0, "a"), Candidate(1, "a", 0.1)), place="f:1"))
    with pytest.raises(UserError, match="f:1: a response names no source"):
        protocol("fuserl").offer(prompt(("", 0.1), ("a", 0.2)))
    with pytest.raises(UserError, match=r"protocol.target: no response has the source 'targe' \(did you mean 'target'"):
        protocol("wrpo", target="targe").check_sources(["a", "target"])
