"""n-grams, near-duplicates and contaminants against plain loops over sets of words."""

from __future__ import annotations

import random

import pytest

from fusemega.selection.ngrams import Contaminants, Grams, near_duplicates, words


def plain_grams(text: str, n: int) -> set[tuple[str, ...]]:
    found = words(text) or [text]
    length = min(n, len(found))
    return {tuple(found[i : i + length]) for i in range(len(found) - length + 1)}


def jaccard(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    return len(a & b) / len(a | b)


def drawn_texts(rng: random.Random, number: int) -> list[str]:
    """Texts of few words, many of them changed copies of earlier ones."""
    texts: list[str] = []
    for _ in range(number):
        if texts and rng.random() < 0.6:
            chosen = rng.choice(texts).split()
            for _ in range(rng.randint(0, 3)):
                chosen[rng.randrange(len(chosen))] = f"w{rng.randint(0, 30)}"
            texts.append(" ".join(chosen))
        else:
            texts.append(" ".join(f"w{rng.randint(0, 30)}" for _ in range(rng.randint(1, 25))))
    return texts


@pytest.mark.parametrize(
    "text", ["one two three four", "Ünïcode, ＦＵＬＬ width; x_1!", "今天天气很好 abc", "a b", "", "?!", "  "]
)
def test_grams_are_those_of_the_words(text: str) -> None:
    for n in (1, 2, 3, 8):
        assert len(Grams(n)(text)) == len(plain_grams(text, n))
    again = " ".join(word.upper() for word in words(text))
    if words(text):
        assert Grams(2)(f"«{again}»").tolist() == Grams(2)(text).tolist()


def test_grams_depend_on_order_and_length() -> None:
    grams = Grams(3)
    texts = ["a b c", "c b a", "a b", "a b c d", "b c", "a", "ab c"]
    assert len({tuple(grams(text).tolist()) for text in texts}) == len(texts)
    assert set(grams("a b c")) < set(grams("a b c d"))


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 1.0])
def test_near_duplicates_are_those_of_plain_loops(threshold: float) -> None:
    removed = 0
    for seed in range(15):
        rng = random.Random(seed)
        texts = drawn_texts(rng, 40)
        n = rng.choice([1, 2, 3])
        kept: list[int] = []
        wanted: dict[int, float] = {}
        for number, text in enumerate(texts):
            near = [jaccard(plain_grams(text, n), plain_grams(texts[other], n)) for other in kept]
            if near and max(near) >= threshold - 1e-9:
                wanted[number] = max(near)
            else:
                kept.append(number)
        found = near_duplicates([Grams(n)(text) for text in texts], threshold)
        assert {number: hit.similarity for number, hit in found.items()} == pytest.approx(wanted)
        for number, hit in found.items():
            assert hit.kept in kept
            assert jaccard(plain_grams(texts[number], n), plain_grams(texts[hit.kept], n)) == pytest.approx(
                hit.similarity
            )
        removed += len(found)
    assert removed > 30
    assert near_duplicates([], threshold) == {}


def test_a_template_is_no_duplicate() -> None:
    """Prompts of a template of 30 words and 8 of their own: 28 of 48 bigrams are common, and none is compared twice."""
    rng = random.Random(0)
    template = " ".join(f"t{i}" for i in range(30))
    texts = [f"{template} {' '.join(f'w{rng.randint(0, 10**6)}' for _ in range(8))}" for _ in range(60)]
    texts += [f"{texts[3]} more", template]
    found = near_duplicates([Grams(2)(text) for text in texts], 0.7)
    assert {number: hit.kept for number, hit in found.items()} == {60: 3, 61: 0}


def test_contaminants_are_those_of_plain_loops() -> None:
    hits = 0
    for seed in range(30):
        rng = random.Random(seed)
        known, n, threshold = drawn_texts(rng, 15), rng.choice([2, 4, 8]), rng.choice([0.3, 0.5, 1.0])
        contaminants = Contaminants(known, n, threshold)
        for prompt in [*drawn_texts(rng, 5), *(f"before {text} after" for text in known)]:
            overlaps = [
                len(plain_grams(prompt, n) & grams) / len(grams) for grams in (plain_grams(t, n) for t in known)
            ]
            hit = contaminants.find(prompt)
            if max(overlaps) < threshold - 1e-9:
                assert hit is None
                continue
            hits += 1
            assert hit is not None and hit.overlap == pytest.approx(max(overlaps))
            assert hit.text == overlaps.index(max(overlaps))
    assert hits > 150


def test_worked_cases() -> None:
    """Ten words, one changed: of 8 trigrams 5 stay, and 5 / 11 is the index."""
    grams = Grams(3)
    a, b = "a b c d e f g h i j", "a b c d X f g h i j"
    found = near_duplicates([grams(a), grams(b)], 5 / 11)
    assert found[1].kept == 0 and found[1].similarity == pytest.approx(5 / 11)
    assert near_duplicates([grams(a), grams(b)], 0.46) == {}
    # A benchmark's question inside a longer prompt; and a short one, which must be the whole prompt.
    contaminants = Contaminants(["What is the capital of France, and why?", "Say hi"], 4, 0.5)
    hit = contaminants.find("Please answer: what is the capital of FRANCE and why? Thanks")
    assert hit == (0, 1.0)
    assert contaminants.find("Say hi to my friend") is None and contaminants.find("say HI!") == (1, 1.0)
